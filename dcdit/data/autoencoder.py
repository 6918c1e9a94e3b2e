"""Autoencoders: images to latents and back. Only this file knows their scale, their channels and their kinds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from dcdit.checks import shown
from dcdit.data.autoencoder_folder import folder_of, read_folder
from dcdit.data.autoencoder_kinds import AutoencoderKind
from dcdit.data.autoencoder_scale import Config
from dcdit.data.latents import IDENTITY, LatentScale, LatentShift, Rounding
from dcdit.errors import NotFiniteError, UserError
from dcdit.runtime.devices import autocast, fingerprint


def to_uint8(images: Tensor, rounding: Rounding = "round") -> Tensor:
    """Images (B, C, height, width) in [-1, 1] to uint8 in 0..255; ``round`` rounds half up.

    Raises:
        NotFiniteError: if a value is not finite, which would become black.
    """
    finite = images.isfinite()
    if not finite.all():
        raise NotFiniteError(
            "a decoded image is not finite: try it in float32 (precision=fp32), a lower guidance.scale, or another"
            " autoencoder=...",
            row=int((~finite).nonzero()[0, 0]),
        )
    half = {"round": 0.5, "truncate": 0.0}[rounding]
    return ((images.float() + 1) * 127.5 + half).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Autoencoder(ABC):
    """Encodes images and decodes latents.

    Attributes:
        name: what a manifest calls it.
        fingerprint: digest of its weights; None if it has none.
        scale, shift: the network sees (z - shift) * scale, by its own configuration.
        channels: C of a latent.
        factor: pixels per latent position along each side.
        random: whether an image has a posterior, from which latents are drawn, or one latent.
        image_size: the only side of an image, in pixels; None for any multiple of the factor.
        distilled: whether it was made to decode latents of another autoencoder, as networks see them.
    """

    name: str
    fingerprint: str | None
    scale: LatentScale
    shift: LatentShift
    channels: int
    factor: int
    random: bool
    image_size: int | None = None
    distilled: bool = False

    @abstractmethod
    def encode(self, images: Tensor, precision: str) -> Tensor:
        """Posterior moments (B, 2C, H, W) float32 of images (B, 3, height, width) uint8, on the device of the weights.

        Where there is no posterior, its mean is the latent, and its deviation as small as diffusers allows.
        ``precision`` is ``fp32``, or ``bf16`` or ``fp16`` for autocast.
        """

    @abstractmethod
    def decode(self, latents: Tensor, rounding: Rounding = "round") -> Tensor:
        """Images (B, channels, height, width) uint8 on the CPU of unscaled latents (B, C, H, W)."""


def _moments_without_variance(latents: Tensor) -> Tensor:
    """Moments (B, 2C, H, W) of a posterior that is latents (B, C, H, W) with the least variance of diffusers."""
    return torch.cat([latents, torch.full_like(latents, -30.0)], dim=1)


class Identity(Autoencoder):
    """Latents are the images themselves, in [-1, 1]; of others than 1 or 3 channels, the first are shown as colours."""

    @override
    def encode(self, images: Tensor, precision: str) -> Tensor:
        return _moments_without_variance(images.float() / 127.5 - 1)

    @override
    def decode(self, latents: Tensor, rounding: Rounding = "round") -> Tensor:
        images = to_uint8(latents, rounding).cpu()
        return images[:, : 3 if images.shape[1] >= 3 else 1]


@dataclass(frozen=True, kw_only=True)
class Diffusers(Autoencoder):
    """An autoencoder of diffusers, frozen.

    Attributes:
        vae: the model, in evaluation mode on its device.
        kind: its class.
        fold: side of the tiles of its positions that become the channels of one position of a latent.
        chunk: images decoded at once, which bounds the memory.
    """

    vae: Any
    kind: AutoencoderKind
    fold: int = 1
    chunk: int = 16

    @override
    @torch.no_grad()
    def encode(self, images: Tensor, precision: str) -> Tensor:
        pixels = images.to(self.vae.device).float()
        pixels = pixels / 255 if self.kind.unit_pixels else pixels / 127.5 - 1
        pixels = pixels[:, :, None] if self.kind.frames else pixels.to(memory_format=torch.channels_last)
        with autocast(precision, self.vae.device):
            (encoded,) = self.vae.encode(pixels, return_dict=False)
        if not self.random:
            return _moments_without_variance(self._folded(encoded.float()))
        return torch.cat([self._folded(encoded.mean.float()), self._folded(encoded.logvar.float())], dim=1)

    def _folded(self, encoded: Tensor) -> Tensor:
        """Latents (B, C, H, W) of what the model encodes, (B, c, h, w) or (B, c, 1, h, w)."""
        return F.pixel_unshuffle(encoded[:, :, 0] if self.kind.frames else encoded, self.fold)

    @override
    @torch.no_grad()
    def decode(self, latents: Tensor, rounding: Rounding = "round") -> Tensor:
        images: list[Tensor] = []
        for part in F.pixel_shuffle(latents.to(self.vae.device), self.fold).split(self.chunk):
            (decoded,) = self.vae.decode(part[:, :, None] if self.kind.frames else part, return_dict=False)
            decoded = decoded[:, :, 0] if self.kind.frames else decoded
            try:
                images.append(to_uint8(decoded * 2 - 1 if self.kind.unit_pixels else decoded, rounding).cpu())
            except NotFiniteError as error:
                raise NotFiniteError(str(error), len(images) * self.chunk + error.row) from None
        return torch.cat(images)


def load_autoencoder(name: str, device: torch.device) -> Autoencoder:
    """The autoencoder called ``name``, on ``device``.

    It is ``identity``, or the local folder or hub id of an autoencoder of diffusers, of one of
    :data:`dcdit.data.autoencoder_kinds.AUTOENCODER_KINDS`.

    Raises:
        UserError: if it cannot be loaded, or is none of these.
    """
    if name == IDENTITY:
        return identity_autoencoder()
    try:
        kind, config, vae = read_folder(folder_of(name))
        if any(config[key] != 3 for key in kind.image_channels):
            raise UserError("it does not take and give images of 3 channels")
        model = vae.to(device) if kind.frames else vae.to(device, memory_format=torch.channels_last)
        return autoencoder_of(_recorded_name(name), kind, config, model)
    except UserError as error:
        raise UserError(f"autoencoder={shown(name)} cannot be loaded: {error}") from error


def identity_autoencoder() -> Identity:
    """The autoencoder of latents that are the images themselves."""
    return Identity(name=IDENTITY, fingerprint=None, scale=1.0, shift=0.0, channels=3, factor=1, random=False)


def autoencoder_of(name: str, kind: AutoencoderKind, config: Config, vae: Any) -> Diffusers:
    """The autoencoder called ``name`` that a model of diffusers is.

    Args:
        name: what a manifest calls it.
        kind: its class.
        config: its whole configuration.
        vae: the model, on its device.

    Raises:
        UserError: if it folds tiles that are not square, or its scale is not understood.
    """
    fold = kind.side_of_tiles(config)
    channels = config[kind.channels] * fold**2
    scale, shift = kind.normalisation(config, channels, vae)
    return Diffusers(
        vae=vae,
        kind=kind,
        fold=fold,
        name=name,
        fingerprint=fingerprint(vae),
        scale=scale,
        shift=shift,
        channels=channels,
        factor=kind.factor(config) * fold,
        random=kind.random,
        image_size=kind.image_size(config) if kind.image_size else None,
        distilled=kind.distilled,
    )


def _recorded_name(name: str) -> str:
    """``name`` with ``./`` before a local folder's, which tells it from a hub id where the folder is gone."""
    relative = Path(name).is_dir() and not Path(name).is_absolute() and not name.startswith((".", "~"))
    return f"./{name}" if relative and name != IDENTITY else name
