"""From latents back to images: the only place that knows autoencoders."""

from collections.abc import Callable

import torch
from torch import Tensor

from dcdit.data.manifest import IDENTITY
from dcdit.errors import UserError

Decoder = Callable[[Tensor], Tensor]
"""Maps network-side latents (B, C, H, W) to images (B, 1 or 3, height, width), uint8."""


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 in 0..255, rounding half up as the ADM suite's exporter does."""
    return ((images.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def load_decoder(autoencoder: str, scale: float, shift: float, device: torch.device, chunk: int = 16) -> Decoder:
    """The decoder of the autoencoder that a manifest names.

    Args:
        autoencoder: ``identity``, or a local path or hub id that ``AutoencoderKL.from_pretrained`` takes.
        scale, shift: as in :class:`dcdit.data.manifest.Manifest`.
        device: where to decode.
        chunk: images decoded at once, which bounds the memory.

    Raises:
        UserError: if the autoencoder cannot be loaded.
    """
    if autoencoder == IDENTITY:
        return lambda latents: to_uint8(latents / scale + shift)
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(autoencoder, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"autoencoder={autoencoder!r} cannot be loaded: give a local folder written by save_pretrained, or a hub id"
            f" and a network connection ({str(error).splitlines()[0]})"
        ) from error

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        raw = (latents / scale + shift).to(device)
        return torch.cat([to_uint8(vae.decode(part).sample).cpu() for part in raw.split(chunk)])

    return decode
