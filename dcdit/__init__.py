"""dcdit: train, resume and sample the Dynamic Chunking Diffusion Transformer (arXiv 2603.06351)."""

from dcdit.network import DCDiT, DiT, Output, Routing

__all__ = ["DCDiT", "DiT", "Output", "Routing"]
__version__ = "0.1.0"
