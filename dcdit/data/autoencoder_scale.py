"""Scale and shift that the networks of an autoencoder of diffusers see its latents with, told by its own files."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from dcdit.checks import Bounds, conform, shown
from dcdit.data.latents import Elements, LatentScale, LatentShift, check_numbers
from dcdit.errors import UserError

Config = Mapping[str, Any]
"""The configuration of an autoencoder, its keys checked, those that it lacks as diffusers has them."""


_Deviation = Annotated[float, Bounds(1e-6, 1e6)]
_Deviations = _Deviation | tuple[_Deviation, ...] | Elements[_Deviation]
_Summand = Annotated[float, Bounds(-1e6, 1e6)]
_Summands = _Summand | tuple[_Summand, ...] | Elements[_Summand]


def own_normalisation(config: Config, channels: int, model: Any) -> tuple[LatentScale, LatentShift]:
    """Scale and shift of the configuration of an autoencoder of diffusers with ``channels`` of latents.

    ``scaling_factor`` and ``shift_factor`` give (z - shift) * factor; ``latents_mean`` and ``latents_std``
    (z - mean) / std * factor.

    Raises:
        UserError: if they contradict each other, or are no numbers for its channels.
    """
    factor = float(config.get("scaling_factor", 1.0))
    mean = _numbers(config, "latents_mean", channels, LatentShift, _Summands)
    deviation = _numbers(config, "latents_std", channels, LatentScale, _Deviations)
    shift = config.get("shift_factor") or 0.0
    if mean is None and deviation is None:
        return factor, shift
    if shift:
        raise UserError(
            "it has both shift_factor and latents_mean: leave out the one that its weights were not trained with"
        )
    scale = factor if deviation is None else conform("scale", (factor / np.array(deviation)).tolist(), LatentScale)
    return scale, mean or 0.0


def _numbers(config: Config, key: str, channels: int, kind: Any, bounded: Any) -> Any:
    """The value of ``key``, one number or nested tuples of one per channel or element; None if there is none."""
    values = config.get(key)
    if values is None:
        return None
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key}={shown(values)} are no numbers for each channel") from None
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[1:] == (1, 1):
        array = array.ravel()
    if array.ndim and len(array) != channels:
        raise UserError(f"{key} has {len(array)} numbers for {channels} channels")
    return conform(key, conform(key, array.tolist(), kind), bounded)


def batch_norm_normalisation(config: Config, channels: int, model: Any) -> tuple[LatentScale, LatentShift]:
    """Scale and shift of a batch norm among the weights, which normalises what networks see; UserError if it cannot."""
    deviation = (model.bn.running_var.double() + config["batch_norm_eps"]).sqrt()
    scale = conform("scale, 1 / the root of bn.running_var,", (1 / deviation).tolist(), LatentScale)
    return scale, conform("bn.running_mean", model.bn.running_mean.double().tolist(), LatentShift)


def no_normalisation(config: Config, channels: int, model: Any) -> tuple[LatentScale, LatentShift]:
    """Neither scale nor shift: encoding and decoding normalise by themselves. UserError if they cannot."""
    if not config["reshape_to_2d"]:
        raise UserError("reshape_to_2d=false: latents without rows and columns are not understood")
    grid = rae_image_size(config) // config["patch_size"]
    for key in ("latents_mean", "latents_std"):
        values = _numbers(config, key, channels, LatentShift, _Summands)
        if values is not None and np.ndim(config[key]) < 3:
            raise UserError(f"{key} has {np.ndim(config[key])} axes: it needs channels, rows and columns")
        if values is not None:
            check_numbers(key, values, (channels, grid, grid))
    return 1.0, 0.0


def rae_image_size(config: Config) -> int:
    """The only side of an image, which its encoder scales to its own."""
    return int(config["encoder_input_size"] // config["encoder_patch_size"] * config["patch_size"])
