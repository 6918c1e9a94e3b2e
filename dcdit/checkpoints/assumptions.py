"""What a file in the form of the reference implementation does not say, and how a user says it to read the file."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcdit.checkpoints.foreign import number_of_classes, published_heads, published_sigma
from dcdit.checkpoints.settings import CONVENTIONS, Convention
from dcdit.data.latents import IDENTITY, LatentScale, LatentShift, LatentSpec, format_numbers
from dcdit.diffusion.settings import PUBLISHED_PROCESS
from dcdit.settings.published import AUTOENCODER, LATENT_SCALE


def assumptions(network: Mapping[str, Any], process: Mapping[str, Any], latents: LatentSpec | None) -> dict[str, str]:
    """The keys of ``assume`` that :func:`dcdit.checkpoints.foreign.reference_state` needs to be read again.

    Args:
        network: what :func:`dcdit.network.build_network` takes, with all keys.
        process: what :func:`dcdit.diffusion.process.build_process` takes.
        latents: that it was trained on; None if they are not known.

    Returns:
        Values as a command line takes them, by key; none of keys whose published value is right.
    """
    values: dict[str, str] = {}
    convention = Convention(process["name"], network.get("time_input", "steps"))
    for name, known in CONVENTIONS.items():
        if known == convention and name != PUBLISHED_PROCESS["name"]:
            values["diffusion"] = name
    if network["heads"] != published_heads(network["width"]):
        values["heads"] = str(network["heads"])
    if "smoothing_sigma" in network and network["smoothing_sigma"] != published_sigma(network["grid"]):
        values["smoothing_sigma"] = repr(network["smoothing_sigma"] or 0)
    classes = network["num_classes"]
    if number_of_classes(classes + (network["label_dropout"] != 0)) != classes:
        values["num_classes"] = str(classes)
    if latents is not None:
        if latents.autoencoder != AUTOENCODER or latents.shape[0] != 4:
            values["autoencoder"] = latents.autoencoder
        if latents.scale != (1.0 if latents.autoencoder == IDENTITY else LATENT_SCALE):
            values["scale"] = _written(latents.scale)
        if latents.shift != 0:
            values["shift"] = _written(latents.shift)
    return values


def describe_reading(
    file: Path, network: Mapping[str, Any], process: Mapping[str, Any], latents: LatentSpec | None
) -> str:
    """Say how dcdit reads ``file`` again; empty if it needs to be told nothing. See :func:`assumptions`."""
    text, values = "", assumptions(network, process, latents)
    if values:
        words = [f"checkpoint={file}", *(f"assume.{key}={value}" for key, value in values.items())]
        command = shlex.join(["dcdit", "sample", *words])
        text = f"\nThe file does not hold all that dcdit needs to read it. This says the rest: {command}"
    shift = process.get("shift", 1)
    if shift != 1:
        text += (
            f"\nThe file does not hold diffusion.shift={shift:g} either: sampler=euler, heun and sde take it as"
            f" sampler.shift={shift:g}"
        )
    return text


def _written(numbers: LatentScale | LatentShift) -> str:
    """Scale or shift as a command line takes it; of many elements only what they are."""
    if isinstance(numbers, tuple) and isinstance(numbers[0], tuple):
        return f"<{format_numbers(numbers)}>"
    return json.dumps(numbers, separators=(",", ":"))
