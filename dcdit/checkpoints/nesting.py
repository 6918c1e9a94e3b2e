"""Where in other programs' files the weights are: below which keys, and behind which prefixes of their names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dcdit.checks import conform
from dcdit.errors import UserError

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that come from what torch wraps around networks: DDP, averaging, compiling, FSDP, checkpointing."""

CONTAINERS = ("state_dict", "model_state_dict", "model_state", "module", "network", "net")
"""Keys of the only weights in a file, or of the raw ones beside averaged ones."""

KEYS = {"ema": ("ema", "ema_model", "model_ema", "ema_state_dict"), "raw": ("model", *CONTAINERS)}
"""Keys of a file below which programs store weights, by what dcdit calls them; the first that is there counts."""

PREFIXES = {"ema": ("ema_model.", "ema."), "raw": ("online_model.", "model.", "network.", "net.")}
"""The same within one state dict, as prefixes of names: of training modules that hold a network, or two of them."""

_DEEPEST = 4
"""Levels of keys above the weights."""


def find_states(values: Mapping[str, Any], level: int = 0) -> dict[str, dict[str, Tensor]]:
    """The weights within the values of a file, ``ema`` before ``raw``; the only ones are ``ema``, except below `model`.

    Raises:
        UserError: if other values stand where the weights should be.
    """
    keys = {
        kind: next((key for key in keys if isinstance(values.get(key), Mapping) and values[key]), None)
        for kind, keys in KEYS.items()
    }
    below = {
        kind: find_states(values[key], level + 1) for kind, key in keys.items() if key is not None and level < _DEEPEST
    }
    if not below:
        return _split_by_prefix(without_wrappers(conform("state", values, dict[str, Tensor])))
    if list(below) == ["raw"] and (keys["raw"] in CONTAINERS or len(below["raw"]) > 1):
        return below["raw"]
    return {kind: states.get(kind) or next(iter(states.values())) for kind, states in below.items()}


def _split_by_prefix(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights behind known prefixes, by kind; all of ``state`` if it has none."""
    found: dict[str, dict[str, Tensor]] = {}
    for kind, prefixes in PREFIXES.items():
        for prefix in prefixes:
            own = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            if own:
                found.setdefault(kind, own)
    if not found:
        return {"ema": state}
    return found if len(found) > 1 else {"ema": next(iter(found.values()))}


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop from the names of parameters what torch's wrappers around the network and its parts added to them.

    Raises:
        UserError: if two parameters get one name.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if own in plain:
            raise UserError(
                f"{name} stands beside another parameter that is {own} of the network too: save one of them"
            )
        plain[own] = tensor
    plain.pop("n_averaged", None)  # of torch's AveragedModel: how many states it has averaged
    return plain
