"""What a user may say about a checkpoint: which of its weights to take, and what its file does not hold. No torch."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from dcdit.checks import Bounds, Count, OneOf, Size, checked, config, conform, shown
from dcdit.data.latents import LatentScale, LatentShift
from dcdit.diffusion.settings import PROCESSES
from dcdit.errors import UserError

Length = Annotated[
    float, Bounds(0.005, 0.28, hint="it is the length of an average over the length of training, 0.05 in EDM2")
]


class _OfWeights:
    """An annotation: the text names EMA weights, raw ones, or an average of a length that is chosen after training."""

    def check(self, name: str, value: str) -> None:
        """Raise :class:`UserError` unless ``value`` is ``ema``, ``raw`` or ``ema@<length>``."""
        kind, at, length = value.partition("@")
        if value not in ("ema", "raw") and not (at and kind == "ema"):
            raise UserError(f"{name}={shown(value)} is not one of ema, raw, ema@<length> such as ema@0.05")
        if at:
            conform(f"{name}=ema@<length>, <length>", length, Length)


WeightsKind = Annotated[str, _OfWeights()]
"""``ema``, ``raw``, or ``ema@0.05``."""


def length_of(kind: str) -> float | None:
    """Relative length of the average that a :data:`WeightsKind` names; None for ``ema`` and ``raw``."""
    _, at, length = kind.partition("@")
    return float(length) if at else None


@config
class Paths:
    """Where things are: ``configs/paths/default.yaml``.

    Attributes:
        data: folder of data sets.
        runs: folder of all runs.
    """

    data: str
    runs: str


@checked
@dataclass(frozen=True)
class AssumeSettings:
    """What the file of another program does not say; None takes the published value.

    Attributes:
        heads: number of attention heads; published for widths 384, 768, 1024 and 1152.
        smoothing_sigma: de-chunk smoothing in grid positions, 0 for none; published: 1, or 2 on a 64 x 64 grid.
        freq_shift: frequency shift of the timestep embedding: 0 as published; 1 is what diffusers' DiT computes,
            whatever its weights were trained with.
        diffusion: name of the process that it was trained for, with this package's direction and scale of time;
            published: ``ddpm``.
        num_classes: number of classes: as many as the label table has rows, if it was trained without a null class, or
            one fewer. None takes one fewer, but of 1,000 rows all.
        autoencoder: the autoencoder of its latents; published: ``stabilityai/sd-vae-ft-ema``.
        scale, shift: the network sees (latent - shift) * scale, with a number or one for each channel; published:
            0.18215 and 0.
    """

    heads: Size | None = None
    smoothing_sigma: Annotated[float, Bounds(0, 512)] | None = None
    freq_shift: Literal[0, 1] | None = None
    diffusion: Annotated[str, OneOf(PROCESSES)] | None = None
    num_classes: Count | None = None
    autoencoder: str | None = None
    scale: LatentScale | None = None
    shift: LatentShift | None = None

    def check_unused(self, kind: str) -> None:
        """Raise :class:`UserError` if anything is given, for a ``kind`` of checkpoint that says everything itself."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        if given:
            key, value = next(iter(given.items()))
            raise UserError(f"assume.{key}={value}: this {kind} says itself what it is, leave assume out")


AS_PUBLISHED = AssumeSettings()
