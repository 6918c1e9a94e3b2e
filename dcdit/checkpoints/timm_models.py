"""Image models of timm, whose weights come from the hub or from a local file."""

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dcdit.checkpoints.nesting import find_states
from dcdit.checkpoints.read import read_checkpoint
from dcdit.checks import conform
from dcdit.errors import UserError
from dcdit.runtime.hub import cause_of, check_hub_answers
from dcdit.runtime.tensors import load_state_strict, read_tensors, shapes_of

RANDOM = "random"
"""Weights that were never trained."""


def create_timm_model(name: str, key: str, remedy: str, pretrained: bool, **options: Any) -> Any:
    """A model of timm, whose weights timm downloads if it is to be ``pretrained``, and else are random.

    Args:
        name: timm's name of the model.
        key: that the name was given as, for messages.
        remedy: what to do where there is no network, for messages.
        options: of ``timm.create_model``.

    Raises:
        UserError: if there is no such model, or its weights cannot be had.
    """
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        instead = f", did you mean {' or '.join(close)}?" if close else ": timm.list_models() lists them"
        raise UserError(f"{key}={name!r} is no model of timm{instead}")
    check_hub_answers()
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, RuntimeError, UserError) as error:
        raise UserError(f"{key}={name!r}: its weights cannot be downloaded ({cause_of(error)}): {remedy}") from error


def read_model_weights(
    path: str, key: str, names: Collection[str] = (), remedy: str = "give one that holds the weights of the model"
) -> dict[str, Any]:
    """Read parameters by name from a local ``.safetensors`` or torch file; nothing in it is run.

    Args:
        path: the file.
        key: that it was given as, for messages.
        names: of the model's parameters, where they are known. Weights that a program stores below other keys or behind
            a prefix are then found too, see :mod:`dcdit.checkpoints.nesting`.
        remedy: what to do where there is no such file, for messages.

    Raises:
        UserError: if it is missing, unsafe, or holds no parameters.
    """
    if not Path(path).is_file():
        raise UserError(f"{key}={path}: there is no such file; {remedy}")
    try:
        if Path(path).suffix == ".safetensors":
            values: dict[str, Any] = dict(read_tensors(Path(path)))
        else:
            values = read_checkpoint(path, legacy=True)
    except UserError as error:
        raise UserError(f"{key}={path}: {error}") from error
    try:
        if names and values.keys().isdisjoint(names):
            return dict(next(iter(find_states(values).values())))
        return conform("state_dict", values.get("state_dict", values), dict[str, Tensor])
    except UserError as error:
        raise UserError(f"{key}={path} holds more than parameters: save the network's state_dict") from error


def fit_timm_model(network: Any, state: Mapping[str, Tensor] | None, side: int | None) -> None:
    """Load weights into a model of timm, and prepare it for images of another size; convolutions take any.

    Args:
        network: the model, for images of its own size.
        state: parameters by name, of the model at its own size or at the new one; None leaves those that it has.
        side: of the images, in pixels; None leaves the model at its own size.

    Raises:
        UserError: if the weights do not fit.
    """
    if state is not None:
        state = _without_classifier(network, state)
        if side is None or shapes_of(state) == shapes_of(network.state_dict()):
            load_state_strict(network, state)
            state = None
    if side is not None and hasattr(network, "set_input_size"):
        network.set_input_size(img_size=(side, side))
    if state is not None:  # of a model that was trained at this very size
        load_state_strict(network, state)


def _without_classifier(network: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model without that of its classifier, which files often hold."""
    classifier = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    own = network.state_dict()
    return {
        key: value
        for key, value in state.items()
        if key in own or not key.startswith(tuple(f"{name}." for name in names))
    }
