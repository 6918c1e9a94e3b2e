"""The description of latents that sampling, evaluation and a resumed run need."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from dcdit.checks import Matches, Name, NonNegative, NotEmpty, Number, Positive, Size, call_checked, checked
from dcdit.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dcdit.network import Network

IDENTITY = "identity"
"""Autoencoder id of latents that are the images themselves, in [-1, 1]."""

Rounding = Literal["round", "truncate"]
"""How pixels become 0..255: ``round`` as DiT and the reference implementation do, ``truncate`` as ADM does."""

_NOT_EMPTY = NotEmpty("give one number for all, or one for each channel")
_T = TypeVar("_T")
Elements = tuple[tuple[tuple[_T, ...], ...], ...]
LatentScale = Positive | Annotated[tuple[Positive, ...], _NOT_EMPTY] | Annotated[Elements[Positive], _NOT_EMPTY]
LatentShift = Number | Annotated[tuple[Number, ...], _NOT_EMPTY] | Annotated[Elements[Number], _NOT_EMPTY]
"""One number, one for each channel, or one for each element (C, H, W)."""

Normalise = Literal["autoencoder", "channel", "element"]
"""The origin of scale and shift: the autoencoder's configuration, or mean and deviation of the latents themselves."""

Fingerprint = Annotated[str, Matches("[0-9a-f]{16}", "a digest of 16 hexadecimal digits")]

USUAL_DEVIATION, USUAL_MEAN = (0.4, 2.5), (-1.5, 1.5)
"""Usual ranges of a channel of latents as a network sees it; the noise that is added has deviation 1 and mean 0."""


@checked
@dataclass(frozen=True)
class LatentStatistics:
    """Mean and deviation of each channel, over all latents of a split and their posteriors."""

    mean: tuple[Number, ...]
    deviation: tuple[NonNegative, ...]

    @property
    def is_normal(self) -> bool:
        """Whether each channel has mean 0 and deviation 1, or is constant."""
        return all(abs(mean) < 1e-3 for mean in self.mean) and all(
            min(abs(deviation - 1), deviation) < 1e-3 for deviation in self.deviation
        )

    def describe_unusual(self) -> str:
        """A warning if these latents, as a network sees them, are far from mean 0 and deviation 1; else empty."""
        for quantity, expected, values, (low, high) in (
            ("deviation", 1, self.deviation, USUAL_DEVIATION),
            ("mean", 0, self.mean, USUAL_MEAN),
        ):
            unusual = [channel for channel, value in enumerate(values) if not low <= value <= high]
            if unusual:
                channel, others = unusual[0], len(unusual) - 1
                more = f" and {others} other{'s' if others > 1 else ''}" if others else ""
                return (
                    f"The latents have {quantity} {values[channel]:.3g} in channel {channel}{more} where the network"
                    f" sees them, not about {expected}: are scale and shift those of their autoencoder? An extraction"
                    " with normalise=channel takes those of the latents themselves"
                )
        return ""


def numbers_of(values: LatentScale | LatentShift) -> Iterator[float]:
    """Yield every number of ``values``, in the order of channels, rows and columns."""
    if isinstance(values, tuple):
        for part in values:
            yield from numbers_of(part)  # type: ignore[arg-type]
    else:
        yield values


def by_channel(values: LatentScale | LatentShift, channels: int) -> tuple[Any, ...]:
    """Scale or shift with one entry per channel: a number, or the (H, W) numbers of its elements."""
    return values if isinstance(values, tuple) else (values,) * channels


def format_numbers(values: LatentScale | LatentShift) -> str:
    """One number as it is; several as their range and count."""
    if not isinstance(values, tuple):
        return f"{values:g}"
    numbers = list(numbers_of(values))
    kind = "elements" if isinstance(values[0], tuple) else "channels"
    return f"{min(numbers):.4g} to {max(numbers):.4g} ({len(numbers)} {kind})"


@cache
def _broadcast(values: LatentScale | LatentShift, device: "torch.device") -> "Tensor | float":
    """``values`` as a factor or summand of latents (B, C, H, W) on ``device``."""
    if not isinstance(values, tuple):
        return values
    import torch

    with torch.inference_mode(False):
        tensor = torch.tensor(values, dtype=torch.float32, device=device)
    return tensor[:, None, None] if tensor.ndim == 1 else tensor


def check_numbers(name: str, values: LatentScale | LatentShift, shape: tuple[int, int, int]) -> None:
    """Raise :class:`UserError` unless ``values`` are one number, one for each channel, or one for each element."""
    sizes: tuple[int, ...] = ()
    part: object = values
    while isinstance(part, tuple):
        sizes = (*sizes, len(part))
        part = part[0] if part else None
    if sizes not in ((), shape[:1], shape) or len(list(numbers_of(values))) != math.prod(sizes):
        raise UserError(
            f"{name} has {' x '.join(map(str, sizes))} numbers, latents of shape {list(shape)} need one, {shape[0]} for"
            f" the channels, or {' x '.join(map(str, shape))} for the elements"
        )


@checked
@dataclass(frozen=True)
class LatentSpec:
    """Latents of ``shape`` (C, H, W) as a network sees them, and the way back to images.

    Attributes:
        autoencoder: ``identity``, or the folder or hub id of an autoencoder of diffusers.
        scale, shift: the network sees (latent - shift) * scale; numbers for all, each channel or each element.
        classes: class names; a label is an index into them.
        fingerprint: digest of the autoencoder's weights; None if unknown.
    """

    shape: tuple[Size, Size, Size]
    autoencoder: Name
    scale: LatentScale
    shift: LatentShift
    classes: Annotated[tuple[Name, ...], NotEmpty("name at least one class")]
    fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        check_numbers("scale", self.scale, self.shape)
        check_numbers("shift", self.shift, self.shape)

    def normalised(self, latents: "Tensor") -> "Tensor":
        """Latents (B, C, H, W) as the network sees them, (latents - shift) * scale."""
        return (latents - _broadcast(self.shift, latents.device)) * _broadcast(self.scale, latents.device)

    def restored(self, latents: "Tensor") -> "Tensor":
        """The inverse of :meth:`normalised`: latents (B, C, H, W) as the autoencoder decodes them."""
        return latents / _broadcast(self.scale, latents.device) + _broadcast(self.shift, latents.device)

    def normalised_statistics(self, statistics: LatentStatistics) -> LatentStatistics | None:
        """``statistics`` of latents after :meth:`normalised`; None where scale and shift differ within a channel."""
        scales, shifts = (by_channel(values, self.shape[0]) for values in (self.scale, self.shift))
        if isinstance(scales[0], tuple) or isinstance(shifts[0], tuple):
            return None
        rows = list(zip(statistics.mean, statistics.deviation, scales, shifts, strict=True))
        return LatentStatistics(
            tuple((mean - shift) * scale for mean, _, scale, shift in rows),
            tuple(deviation * scale for _, deviation, scale, _ in rows),
        )

    @property
    def positions(self) -> int:
        """Number of positions on the latent grid, L = H * W."""
        return self.shape[1] * self.shape[2]

    def to_plain(self) -> dict[str, Any]:
        """The plain values that a checkpoint holds."""
        return {**asdict(self), "shape": list(self.shape), "classes": list(self.classes)}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], name: str) -> "LatentSpec":
        """The latents that :meth:`to_plain` described; a UserError that begins with ``name`` for other values."""
        return call_checked(cls, values, name)

    def difference(self, other: "LatentSpec") -> str | None:
        """A sentence on the first difference to ``other``; None if the latents are of one kind.

        The autoencoder's name may differ, such as after moving it, where the fingerprints of its weights are equal.
        """
        if difference := self.difference_in_encoding(other) or self.difference_in_scale(other):
            return difference
        if len(self.classes) != len(other.classes):
            return f"there are {len(self.classes)} classes there and {len(other.classes)} here"
        for label, (one, two) in enumerate(zip(self.classes, other.classes, strict=True)):
            if one != two:
                return f"class {label} is {one!r} there and {two!r} here"
        return None

    def difference_in_encoding(self, other: "LatentSpec") -> str | None:
        """A sentence on the first difference in shape or autoencoder; None if there is none."""
        same_weights = self.fingerprint is not None and self.fingerprint == other.fingerprint
        for key in ("shape", "autoencoder", "fingerprint"):
            one, two = getattr(self, key), getattr(other, key)
            if one != two and not (key == "autoencoder" and same_weights) and None not in (one, two):
                return f"{key} is {one} there and {two} here"
        return None

    def difference_in_scale(self, other: "LatentSpec") -> str | None:
        """A sentence on the first difference in scale or shift; None if there is none."""
        for key in ("scale", "shift"):
            if getattr(self, key) != getattr(other, key):
                one, two = format_numbers(getattr(self, key)), format_numbers(getattr(other, key))
                if one == two:
                    return f"{key} differs, though both have numbers of {one}"
                return f"{key} is {one} there and {two} here"
        return None

    def check_network(self, network: "Network") -> None:
        """Raise :class:`UserError` unless ``network`` takes latents of this shape and number of classes."""
        channels, height, width = self.shape
        pairs: list[tuple[str, int, object]] = [
            ("grid", network.grid[0], height if height == width else (height, width)),
            ("channels", network.channels, channels),
            ("num_classes", network.num_classes, len(self.classes)),
        ]
        for name, configured, needed in pairs:
            if configured != needed:
                raise UserError(
                    f"model.{name}={configured} does not fit the shards, which have {needed}"
                    f" (latents {channels} x {height} x {width}, {len(self.classes)} classes):"
                    f" set model.{name}={needed}, or point data.directory at other shards"
                )
