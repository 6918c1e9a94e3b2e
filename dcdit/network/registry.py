"""The table of networks by name, and the function that builds one of them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from dcdit.checks import Table, build_named
from dcdit.errors import UserError
from dcdit.runtime.devices import without_memory
from dcdit.runtime.memory import free_memory
from dcdit.runtime.tensors import shapes_of

if TYPE_CHECKING:
    from dcdit.network.interface import Network

NETWORKS: "Table[Callable[..., Network]]" = Table("model.name")
"""What ``model.name`` may say; :mod:`dcdit.network` enters its classes.

Nothing else is ever constructed from a configuration or a checkpoint.
"""


def build_network(spec: Mapping[str, Any]) -> "Network":
    """Construct the network that ``spec`` describes: ``name`` and the constructor's arguments.

    A network that does not fit into memory is refused before it takes any.

    Raises:
        UserError: if the name is not in :data:`NETWORKS`, an argument is unknown, of the wrong type or out of range, or
            the network does not fit into memory.
    """
    if torch.get_default_device().type != "meta":
        _check_memory(build_without_memory(spec))
    return build_named(NETWORKS, spec, "model")


def build_without_memory(spec: Mapping[str, Any]) -> "Network":
    """The network that ``spec`` describes, whose parameters have shapes but no numbers; UserError as above."""
    with without_memory():
        return build_named(NETWORKS, spec, "model")


def shapes_of_spec(spec: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Shapes of the state of the network that ``spec`` describes, by name; it takes no memory. UserError as above."""
    return shapes_of(build_without_memory(spec).state_dict())


def _check_memory(network: "Network") -> None:
    """Raise :class:`UserError` if there is less memory than a network takes that was built without any."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    tensors = (*network.parameters(), *network.buffers())
    needed, free = sum(tensor.numel() * tensor.element_size() for tensor in tensors), free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"model: this {network.title} has {parameters / 1e6:,.0f}M parameters and takes {needed / 1e9:,.1f} GB,"
            f" {free / 1e9:,.1f} GB are free here: lower model.width, model.depth, model.grid or model.num_classes"
        )
