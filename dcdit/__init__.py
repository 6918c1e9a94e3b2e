"""dcdit: train, resume and sample the Dynamic Chunking Diffusion Transformer (arXiv 2603.06351)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcdit.errors import UserError
    from dcdit.network import DCDiT, DiT, Output, Routing
    from dcdit.sampling.pipeline import Pipeline, Samples, load

__all__ = ["DCDiT", "DiT", "Output", "Pipeline", "Routing", "Samples", "UserError", "load"]
__version__ = "0.1.0"


_HOMES = {
    **dict.fromkeys(("Pipeline", "Samples", "load"), "dcdit.sampling.pipeline"),
    **dict.fromkeys(("DCDiT", "DiT", "Output", "Routing"), "dcdit.network"),
    "UserError": "dcdit.errors",
}


def __getattr__(name: str) -> Any:
    """The public names, loaded when they are asked for: commands that need no torch start without it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dcdit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
