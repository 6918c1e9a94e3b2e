"""What latents are: all that sampling, evaluation and a resumed run must know of them."""

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
"""Of pixels on the way to 0..255: ``round`` as DiT and the reference implementation do, ``truncate`` as ADM does."""

_SOME = NotEmpty("give one number for all, or one for each channel")
_T = TypeVar("_T")
_Elements = tuple[tuple[tuple[_T, ...], ...], ...]
Scale = Positive | Annotated[tuple[Positive, ...], _SOME] | Annotated[_Elements[Positive], _SOME]
Shift = Number | Annotated[tuple[Number, ...], _SOME] | Annotated[_Elements[Number], _SOME]
"""One number, one for each channel, or one for each element (C, H, W)."""

Normalise = Literal["autoencoder", "channel", "element"]
"""Where scale and shift come from: the autoencoder's configuration, or mean and deviation of the latents themselves."""

Fingerprint = Annotated[str, Matches("[0-9a-f]{16}", "a digest of 16 hexadecimal digits")]


USUAL_DEVIATION, USUAL_MEAN = (0.4, 2.5), (-1.5, 1.5)
"""What a channel of latents has where a network sees them; the noise that is added has deviation 1 and mean 0."""


@checked
@dataclass(frozen=True)
class LatentStatistics:
    """Mean and deviation of each channel, over all latents of a split and their posteriors.

    Attributes:
        mean, deviation: one number for each channel.
    """

    mean: tuple[Number, ...]
    deviation: tuple[NonNegative, ...]

    @property
    def is_normal(self) -> bool:
        """Whether each channel has mean 0 and deviation 1, or is constant."""
        near = 1e-3
        return all(abs(mean) < near for mean in self.mean) and all(
            abs(deviation - 1) < near or deviation < near for deviation in self.deviation
        )

    def remark(self) -> str:
        """A warning if these latents, as a network sees them, are far from mean 0 and deviation 1; else empty."""
        for quantity, expected, values, (low, high) in (
            ("deviation", 1, self.deviation, USUAL_DEVIATION),
            ("mean", 0, self.mean, USUAL_MEAN),
        ):
            unusual = [channel for channel, value in enumerate(values) if not low <= value <= high]
            if unusual:
                channel, others = unusual[0], len(unusual) - 1
                return (
                    f"The latents have {quantity} {values[channel]:.3g} in channel {channel}"
                    + (f" and {others} other{'s' if others > 1 else ''}" if others else "")
                    + f" where the network sees them, not about {expected}: are scale and shift those of their"
                    " autoencoder? An extraction with normalise=channel takes those of the latents themselves"
                )
        return ""


def numbers_of(values: Scale | Shift) -> Iterator[float]:
    """All numbers in ``values``."""
    if isinstance(values, tuple):
        for each in values:
            yield from numbers_of(each)  # type: ignore[arg-type]
    else:
        yield values


def by_channel(values: Scale | Shift, channels: int) -> tuple[Any, ...]:
    """For each channel its number, or the (H, W) numbers of its elements."""
    return values if isinstance(values, tuple) else (values,) * channels


def number_words(values: Scale | Shift) -> str:
    """A number as it is; of more, how many and their range."""
    if not isinstance(values, tuple):
        return f"{values:g}"
    found = list(numbers_of(values))
    kind = "elements" if isinstance(values[0], tuple) else "channels"
    return f"{min(found):.4g} to {max(found):.4g} ({len(found)} {kind})"


@cache
def _tensor(values: Scale | Shift, device: "torch.device") -> "Tensor":
    import torch

    with torch.inference_mode(False):
        found = torch.tensor(values, dtype=torch.float32, device=device)
    return found[:, None, None] if found.ndim == 1 else found


def _for(latents: "Tensor", values: Scale | Shift) -> "Tensor | float":
    """``values`` as a factor or summand of ``latents`` (B, C, H, W)."""
    return _tensor(values, latents.device) if isinstance(values, tuple) else values


def check_numbers(name: str, values: Scale | Shift, shape: tuple[int, int, int]) -> None:
    """Raise :class:`UserError` unless ``values`` are one number, one for each channel, or one for each element."""
    if not isinstance(values, tuple):
        return
    sizes: list[int] = []
    part: object = values
    while isinstance(part, tuple):
        sizes.append(len(part))
        part = part[0] if part else None
    uneven = len(sizes) == 3 and sum(1 for _ in numbers_of(values)) != sizes[0] * sizes[1] * sizes[2]
    if tuple(sizes) not in (shape[:1], shape) or uneven:
        raise UserError(
            f"{name} has {' x '.join(map(str, sizes))} numbers, latents of shape {list(shape)} need one, {shape[0]} for"
            f" the channels, or {' x '.join(map(str, shape))} for the elements"
        )


@checked
@dataclass(frozen=True)
class LatentSpec:
    """Latents as a network sees them, and the way back to images.

    Attributes:
        shape: (C, H, W).
        autoencoder: ``identity``, or the folder or hub id of an autoencoder of diffusers.
        scale, shift: the network sees (latent - shift) * scale; numbers for all, each channel or each element.
        classes: class names; a label is an index into them.
        fingerprint: digest of the autoencoder's weights; None if unknown.
    """

    shape: tuple[Size, Size, Size]
    autoencoder: Name
    scale: Scale
    shift: Shift
    classes: Annotated[tuple[Name, ...], NotEmpty("name at least one class")]
    fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        check_numbers("scale", self.scale, self.shape)
        check_numbers("shift", self.shift, self.shape)

    def normalised(self, latents: "Tensor") -> "Tensor":
        """What the network sees, (z - shift) * scale, of latents z (B, C, H, W)."""
        return (latents - _for(latents, self.shift)) * _for(latents, self.scale)

    def restored(self, seen: "Tensor") -> "Tensor":
        """Latents (B, C, H, W) of what the network sees."""
        return seen / _for(seen, self.scale) + _for(seen, self.shift)

    def seen(self, statistics: LatentStatistics) -> LatentStatistics | None:
        """Statistics of what the network sees; None where scale and shift differ within a channel."""
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
        """Grid positions L = H * W."""
        return self.shape[1] * self.shape[2]

    def to_plain(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**asdict(self), "shape": list(self.shape), "classes": list(self.classes)}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], place: str) -> "LatentSpec":
        """What :meth:`to_plain` returned; :class:`UserError`, which names ``place``, if the values are not such."""
        return call_checked(cls, values, place)

    def difference(self, other: "LatentSpec") -> str | None:
        """The first difference to ``other`` in words; None if the latents are of one kind.

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
        """The same, but for shape and autoencoder alone."""
        same_weights = self.fingerprint is not None and self.fingerprint == other.fingerprint
        for key in ("shape", "autoencoder", "fingerprint"):
            one, two = getattr(self, key), getattr(other, key)
            if one != two and not (key == "autoencoder" and same_weights) and None not in (one, two):
                return f"{key} is {one} there and {two} here"
        return None

    def difference_in_scale(self, other: "LatentSpec") -> str | None:
        """The same, but for scale and shift alone."""
        for key in ("scale", "shift"):
            if getattr(self, key) != getattr(other, key):
                one, two = number_words(getattr(self, key)), number_words(getattr(other, key))
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
        for name, wanted, found in pairs:
            if wanted != found:
                raise UserError(
                    f"model.{name}={wanted} does not fit the shards, which have {found}"
                    f" (latents {channels} x {height} x {width}, {len(self.classes)} classes):"
                    f" set model.{name}={found}, or point data.directory at other shards"
                )
