"""The table of networks by name, and the function that builds one of them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dcdit.checks import Table, build_named
from dcdit.errors import UserError
from dcdit.runtime.devices import without_memory
from dcdit.runtime.memory import free_memory
from dcdit.runtime.tensors import check_shapes, describe_differences, differing_shapes, shapes_of
from dcdit.settings.plugins import keys_of_plugins, plugins_may_have_changed

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


def check_weights(spec: Mapping[str, Any], *states: Mapping[str, Tensor]) -> "Network":
    """Check that ``states``, parameters by name, fit the network that ``spec`` describes.

    Returns:
        The network, without memory.

    Raises:
        UserError: naming the first difference, or if there is no such network.
        ChangedPluginError: if what differs is of a plug-in; naming it, and some parameters of each kind of difference.
    """
    values = {"model": spec}
    with plugins_may_have_changed(values):
        network = build_without_memory(spec)
    expected = shapes_of(network.state_dict())
    for state in states:
        shapes = shapes_of(state)
        differing = differing_shapes(shapes, expected)
        with plugins_may_have_changed(values):
            if differing and all(name.startswith(_parameters_of_plugins(spec)) for name, _, _ in differing):
                raise UserError(describe_differences(differing))
        check_shapes(shapes, expected)
    return network


def _parameters_of_plugins(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names begin with of parameters that a plug-in made: those of ``model.router`` with ``router.``."""
    keys = [key.removeprefix("model.") for key in keys_of_plugins({"model": spec})]
    return tuple("" if key == "name" else f"{key}." for key in keys)


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
