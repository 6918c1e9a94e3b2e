"""The networks: torch is all they need."""

from collections.abc import Callable, Mapping
from typing import Any

from dcdit.checks import build_named
from dcdit.network.dcdit import DCDiT
from dcdit.network.dit import DiT
from dcdit.network.interface import Component, Network, Output
from dcdit.network.routing import Routing

__all__ = ["NETWORKS", "Component", "DCDiT", "DiT", "Network", "Output", "Routing", "build_network"]

NETWORKS: dict[str, Callable[..., Network]] = {"dcdit": DCDiT, "dit": DiT}
"""What ``model.name`` may say. Nothing else is ever constructed from a configuration or a checkpoint."""


def build_network(spec: Mapping[str, Any]) -> Network:
    """Construct the network that ``spec`` describes: ``name`` and the constructor's arguments.

    Raises:
        UserError: if the name is not on the list, or an argument is unknown, of the wrong type or out of range.
    """
    return build_named(NETWORKS, spec, "model")
