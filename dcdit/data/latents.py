"""What latents are: all that sampling, evaluation and a resumed run must know of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from dcdit.checks import Bounds, Matches, NotEmpty, Size, call_checked, checked
from dcdit.errors import UserError

IDENTITY = "identity"
"""Autoencoder id of latents that are the images themselves, in [-1, 1]."""

Rounding = Literal["round", "truncate"]
"""Of pixels on the way to 0..255: ``round`` as DiT and the reference implementation do, ``truncate`` as ADM does."""

Scale = Annotated[float, Bounds(low=0, open_low=True)]
Fingerprint = Annotated[str, Matches("[0-9a-f]{16}", "a digest of 16 hexadecimal digits")]


USUAL_DEVIATION = (0.4, 2.5)
"""Of latents as a network sees them; the noise that is added has 1."""


def deviation_remark(deviation: float) -> str:
    """A warning if latents are far from the deviation 1 that the noise has; else empty."""
    low, high = USUAL_DEVIATION
    if low <= deviation <= high:
        return ""
    return (
        f"The latents have deviation {deviation:.3g} where the network sees them, not about 1: is their scale that of"
        " their autoencoder?"
    )


@checked
@dataclass(frozen=True)
class LatentSpec:
    """Latents as a network sees them, and the way back to images.

    Attributes:
        shape: (C, H, W).
        autoencoder: ``identity``, or what ``AutoencoderKL.from_pretrained`` takes.
        scale, shift: the network sees (latent - shift) * scale.
        classes: class names; a label is an index into them.
        fingerprint: digest of the autoencoder's weights; None if unknown.
    """

    shape: tuple[Size, Size, Size]
    autoencoder: str
    scale: Scale
    shift: float
    classes: Annotated[tuple[str, ...], NotEmpty("name at least one class")]
    fingerprint: Fingerprint | None = None

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
        same_weights = self.fingerprint is not None and self.fingerprint == other.fingerprint
        for key in ("shape", "autoencoder", "fingerprint", "scale", "shift"):
            one, two = getattr(self, key), getattr(other, key)
            if one != two and not (key == "autoencoder" and same_weights) and None not in (one, two):
                return f"{key} is {one} there and {two} here"
        if len(self.classes) != len(other.classes):
            return f"there are {len(self.classes)} classes there and {len(other.classes)} here"
        for label, (one, two) in enumerate(zip(self.classes, other.classes, strict=True)):
            if one != two:
                return f"class {label} is {one!r} there and {two!r} here"
        return None

    def check_network(self, network: Any) -> None:
        """Raise :class:`UserError` unless ``network``, a :class:`dcdit.network.Network`, takes these latents."""
        channels, height, width = self.shape
        pairs = [
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
