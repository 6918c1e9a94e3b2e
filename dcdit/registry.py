"""Networks by name: the allow-list between a configuration or a checkpoint and the constructors."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dcdit.config import call_checked
from dcdit.errors import UserError
from dcdit.network import DCDiT, DiT

NETWORKS: dict[str, type[nn.Module]] = {"dcdit": DCDiT, "dit": DiT}
"""What the key ``model.name`` may say. Nothing else is ever constructed from a checkpoint."""


def build_network(spec: Mapping[str, Any]) -> nn.Module:
    """Construct the network that ``spec`` describes: ``name`` and the constructor's arguments.

    Raises:
        UserError: if the name is not on the list, or an argument is unknown, of the wrong type or out of range.
    """
    values = dict(spec)
    name = values.pop("name", None)
    if name not in NETWORKS:
        raise UserError(f"model.name={name!r} is not one of {', '.join(NETWORKS)}")
    return call_checked(NETWORKS[name], values, prefix="model")
