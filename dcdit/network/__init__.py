"""The networks: torch and timm are all they need."""

from dcdit.network.dcdit import DCDiT, Output
from dcdit.network.dit import DiT
from dcdit.network.routing import Routing

__all__ = ["DCDiT", "DiT", "Output", "Routing"]
