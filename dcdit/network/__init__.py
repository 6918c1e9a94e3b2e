"""The networks: torch is all they need."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dcdit.checks import build_named
from dcdit.errors import UserError
from dcdit.network.dcdit import DCDiT
from dcdit.network.dit import DiT
from dcdit.network.interface import Component, Network, Output
from dcdit.network.routing import Routing
from dcdit.runtime.devices import without_memory
from dcdit.runtime.memory import free_memory

__all__ = ["NETWORKS", "Component", "DCDiT", "DiT", "Network", "Output", "Routing", "build_network"]

NETWORKS: dict[str, Callable[..., Network]] = {"dcdit": DCDiT, "dit": DiT}
"""What ``model.name`` may say. Nothing else is ever constructed from a configuration or a checkpoint."""


def build_network(spec: Mapping[str, Any]) -> Network:
    """Construct the network that ``spec`` describes: ``name`` and the constructor's arguments.

    Its size is known before it takes memory: a network that does not fit is not made.

    Raises:
        UserError: if the name is not on the list, an argument is unknown, of the wrong type or out of range, or the
            network does not fit into memory.
    """
    if torch.get_default_device().type != "meta":
        with without_memory():
            _check_memory(build_named(NETWORKS, spec, "model"))
    return build_named(NETWORKS, spec, "model")


def _check_memory(network: Network) -> None:
    """Raise :class:`UserError` if there is less memory than a network takes, which was built without any."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    tensors = (*network.parameters(), *network.buffers())
    needed, free = sum(tensor.numel() * tensor.element_size() for tensor in tensors), free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"model: this {network.title} has {parameters / 1e6:,.0f}M parameters and takes {needed / 1e9:,.1f} GB,"
            f" {free / 1e9:,.1f} GB are free here: lower model.width, model.depth, model.grid or model.num_classes"
        )
