"""The networks: torch is all they need."""

from dcdit.network.dcdit import DCDiT
from dcdit.network.dit import DiT
from dcdit.network.interface import Component, Network, Output
from dcdit.network.registry import NETWORKS, build_network
from dcdit.network.routing import Routing

__all__ = ["NETWORKS", "Component", "DCDiT", "DiT", "Network", "Output", "Routing", "build_network"]

NETWORKS.update(dcdit=DCDiT, dit=DiT)
