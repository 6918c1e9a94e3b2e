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
    """Folders: of data sets, and of all runs."""

    data: str
    runs: str


@dataclass(frozen=True)
class Convention:
    """How a program trains by a process, where no shape tells it.

    Attributes:
        process: name in :data:`PROCESSES`.
        time_input: what its network embeds of the time, see :data:`dcdit.network.embeddings.TimeInput`. If that runs
            the other way than here, the network predicts the velocity along it, minus ours.
    """

    process: str
    time_input: str = "steps"


CONVENTIONS = {name: Convention(name) for name in PROCESSES} | {
    "flow_sit": Convention("flow", "reversed"),
    "flow_repa": Convention("flow", "unit"),
}
"""What ``assume.diffusion`` may say: a process as dcdit trains by it, or as another program does."""


@checked
@dataclass(frozen=True)
class AssumeSettings:
    """What the file of another program does not say; ``configs/assume/default.yaml`` describes each key."""

    heads: Size | None = None
    smoothing_sigma: Annotated[float, Bounds(0, 512)] | None = None
    freq_shift: Literal[0, 1] | None = None
    diffusion: Annotated[str, OneOf(CONVENTIONS)] | None = None
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
