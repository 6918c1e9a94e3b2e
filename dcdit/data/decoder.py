"""From stored latents to what the network sees, and from there to images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dcdit.data.autoencoder import Autoencoder, load_autoencoder
from dcdit.data.autoencoder_folder import is_local
from dcdit.data.latents import IDENTITY, LatentSpec, Rounding, format_numbers
from dcdit.data.manifest import MOMENTS, Manifest
from dcdit.errors import UserError
from dcdit.runtime.processes import say

_DEVIATIONS = 3.0
"""Latents of deviation 1 that are shown without decoding are black and white at so many deviations."""

Decoder = Callable[[Tensor], Tensor]
"""Maps network-side latents (B, C, H, W) to images (B, 1 or 3, height, width), uint8."""


def network_latents(stored: Tensor, manifest: Manifest, generator: torch.Generator | None) -> Tensor:
    """Scaled float32 latents from stored ones; from moments, a fresh sample of the posterior.

    Args:
        stored: (B, C, H, W) latents, or (B, 2C, H, W) mean and log-variance.
        manifest: says which.
        generator: for the posterior's noise, on the device of ``stored``; None takes the posterior's mean.

    Returns:
        (B, C, H, W), as :meth:`LatentSpec.normalised` gives them.
    """
    z = stored.float()
    if manifest.representation == MOMENTS:
        z, log_variance = z.chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=z.device)
            z = z + torch.exp(0.5 * log_variance) * noise
    return manifest.spec.normalised(z)


@dataclass(frozen=True)
class LatentDecoder:
    """A :data:`Decoder` that has an identity, by which results are told apart.

    Attributes:
        autoencoder: decodes the latents.
        latents: their description: scale, shift and shape.
        rounding: of pixels, see :func:`dcdit.data.autoencoder.to_uint8`.
        undecoded: what is shown instead of pictures, such as ``the first 3 of 4 channels``; empty for pictures.
    """

    autoencoder: Autoencoder
    latents: LatentSpec
    rounding: Rounding
    undecoded: str = ""

    @property
    def identity(self) -> str:
        """Digest of the weights, wherever they lie; the name where there are none, with what is no picture."""
        name = self.autoencoder.fingerprint or self.autoencoder.name
        return f"{name}: {self.undecoded}" if self.undecoded else name

    def __call__(self, latents: Tensor) -> Tensor:
        """Images (B, 1 or 3, height, width) uint8 of network-side latents (B, C, H, W)."""
        if self.undecoded and self.latents.autoencoder != IDENTITY:  # as the network sees them, whatever their scale
            return self.autoencoder.decode(latents / _DEVIATIONS, self.rounding)
        return self.autoencoder.decode(self.latents.restored(latents), self.rounding)

    def size(self, device: torch.device) -> tuple[int, int]:
        """Height and width of a decoded image, in pixels."""
        height, width = self(torch.zeros(1, *self.latents.shape, device=device)).shape[2:]
        return height, width


def _as_networks_see_them(latents: LatentSpec, autoencoder: Autoencoder) -> LatentSpec:
    """``latents`` for a distilled ``autoencoder``, which decodes what networks see; UserError if they see another."""
    for key, values in (("scale", latents.scale), ("shift", latents.shift)):
        if isinstance(values, tuple):
            raise UserError(
                f"autoencoder={autoencoder.name!r} decodes latents with the scale and shift of their autoencoder's own"
                f" configuration, these have {key} {format_numbers(values)}: leave autoencoder out"
            )
    return replace(latents, scale=autoencoder.scale, shift=autoencoder.shift)


def _undecoded(autoencoder: Autoencoder, latents: LatentSpec) -> str:
    """What is shown instead of pictures, see :class:`LatentDecoder`; empty for pictures."""
    channels = latents.shape[0]
    if autoencoder.name != IDENTITY or (latents.autoencoder == IDENTITY and channels in (1, 3)):
        return ""
    shown = 3 if channels >= 3 else 1
    what = f"the first {shown} of {channels} channels" if shown < channels else f"{channels} channels"
    return what if latents.autoencoder == IDENTITY else f"{what} of undecoded latents"


def load_decoder(
    latents: LatentSpec, device: torch.device, instead: str | None = None, rounding: Rounding = "round"
) -> LatentDecoder:
    """The decoder for ``latents``.

    Args:
        latents: their description.
        device: where to decode.
        instead: another autoencoder than the one named there, such as the same one in another folder.
        rounding: of pixels, see :func:`dcdit.data.autoencoder.to_uint8`.

    Raises:
        UserError: if the autoencoder cannot be loaded, or its weights are not those that made the latents.
    """
    if instead is None and is_local(latents.autoencoder) and not Path(latents.autoencoder).is_dir():
        raise UserError(
            f"the latents were made by the autoencoder in the folder {latents.autoencoder}, which is not there (seen"
            f" from {Path.cwd()}): give its present folder as autoencoder=..., or autoencoder=identity to see latents"
        )
    autoencoder, channels = load_autoencoder(instead or latents.autoencoder, device), latents.shape[0]
    expected = latents.fingerprint
    if expected is not None and autoencoder.fingerprint != expected and not instead:
        raise UserError(
            f"autoencoder={autoencoder.name!r} has weights {autoencoder.fingerprint}, the latents were made with"
            f" {expected}: give the autoencoder they were made with, or this one deliberately, with autoencoder=..."
        )
    undecoded = _undecoded(autoencoder, latents)
    if undecoded:
        origin = f"{channels} channels" if latents.autoencoder == IDENTITY else latents.autoencoder
        say(
            f"autoencoder=identity: latents of {origin} are no pictures. They are shown without decoding, at"
            " most three channels as colours, and figures of them are not those of images"
        )
    elif expected is not None and autoencoder.fingerprint != expected:
        say(
            f"Decoding with autoencoder={autoencoder.name!r}, weights {autoencoder.fingerprint}; the latents were made"
            f" with {latents.autoencoder!r}, weights {expected}. Figures are those of another autoencoder"
        )
    if autoencoder.name != IDENTITY and autoencoder.channels != channels:
        raise UserError(f"autoencoder={autoencoder.name!r} has {autoencoder.channels} channels, the latents {channels}")
    size, side = autoencoder.image_size, latents.shape[1] * autoencoder.factor
    if size not in (None, side):
        raise UserError(
            f"autoencoder={autoencoder.name!r} gives images of side {size} alone, the latents are those of side {side}"
        )
    if instead and autoencoder.distilled and (expected is None or autoencoder.fingerprint != expected):
        latents = _as_networks_see_them(latents, autoencoder)
    return LatentDecoder(autoencoder, latents, rounding, undecoded)
