"""Networks and data sources by name: the allow-list between a configuration or checkpoint and a constructor."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dcdit.data.builtin import Digits, Source, Synthetic
from dcdit.errors import UserError
from dcdit.network import DCDiT, DiT
from dcdit.settings.schema import call_checked

NETWORKS: dict[str, Callable[..., nn.Module]] = {"dcdit": DCDiT, "dit": DiT}
"""What ``model.name`` may say. Nothing else is ever constructed from a checkpoint."""

SOURCES: dict[str, Callable[..., Source]] = {"digits": Digits, "synthetic": Synthetic}
"""What ``data.source.name`` may say."""


def _build(table: Mapping[str, Callable[..., Any]], spec: Mapping[str, Any], prefix: str) -> Any:
    values = dict(spec)
    name = values.pop("name", None)
    if name not in table:
        raise UserError(f"{prefix}.name={name!r} is not one of {', '.join(table)}")
    return call_checked(table[name], values, prefix)


def build_network(spec: Mapping[str, Any]) -> nn.Module:
    """Construct the network that ``spec`` describes: ``name`` and the constructor's arguments.

    Raises:
        UserError: if the name is not on the list, or an argument is unknown, of the wrong type or out of range.
    """
    return _build(NETWORKS, spec, "model")


def build_source(spec: Mapping[str, Any]) -> Source:
    """Construct the data source that ``spec`` describes; raises like :func:`build_network`."""
    return _build(SOURCES, spec, "data.source")
