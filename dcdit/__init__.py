"""dcdit: train, resume and sample the Dynamic Chunking Diffusion Transformer (arXiv 2603.06351)."""

from typing import Any

__all__ = ["DCDiT", "DiT", "Output", "Routing"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The networks, loaded when they are asked for: commands that need no torch start without it."""
    if name in __all__:
        import dcdit.network

        return getattr(dcdit.network, name)
    raise AttributeError(f"module 'dcdit' has no attribute {name!r}")
