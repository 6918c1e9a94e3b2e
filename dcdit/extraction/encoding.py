"""From a batch of pixels to what the shards store of it: latents, and perhaps features of an encoder."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcdit.checkpoints.encoder import Encoder
from dcdit.data.autoencoder import Autoencoder
from dcdit.data.manifest import SAMPLE
from dcdit.data.statistics import StoredArray
from dcdit.extraction.decode import Decoded
from dcdit.extraction.settings import ExtractionSettings


class Launched(NamedTuple):
    """What a device computes of a batch, once for the images and once for the flipped ones.

    Attributes:
        moments: (n, 2C, H, W) of the latents.
        features: (n, F, h, w) of the encoder; empty if none are written.
    """

    moments: list[Tensor]
    features: list[Tensor]


class EncodedBatch(NamedTuple):
    """A batch of images with what is stored of it, once for the images and once for the flipped ones."""

    decoded: Decoded
    latents: Sequence[StoredArray]
    features: Sequence[StoredArray]


class Encoding:
    """Encodes batches, and again where that overflows.

    Args:
        autoencoder: on the device that encodes.
        encoder: whose features are stored too; None stores none.
        settings: of the shards.
    """

    def __init__(self, autoencoder: Autoencoder, encoder: Encoder | None, settings: ExtractionSettings) -> None:
        self.autoencoder, self.encoder, self.settings = autoencoder, encoder, settings

    def launch(self, pixels: NDArray[np.uint8], precision: str) -> Launched:
        """Begin to encode images (n, height, width, 3); on a GPU this returns before the results are there."""
        if not len(pixels):
            return Launched([], [])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        views = [images, images.flip(-1)] if self.settings.hflip else [images]
        features = [self.encoder.see(view, precision) for view in views] if self.encoder else []
        return Launched([self.autoencoder.encode(view, precision) for view in views], features)

    def collect(self, batch: Decoded, launched: Launched) -> EncodedBatch:
        """What is stored of a batch, in float32 where autocast overflows."""
        encoded = self._arrays(batch, launched)
        arrays = (*encoded.latents, *encoded.features)
        if self.settings.precision != "fp32" and not all(np.isfinite(array).all() for array in arrays):
            return self._arrays(batch, self.launch(batch.images, "fp32"))  # autocast has overflowed
        return encoded

    def _arrays(self, batch: Decoded, launched: Launched) -> EncodedBatch:
        latents = [self._store(batch, part.cpu(), view) for view, part in enumerate(launched.moments)]
        with np.errstate(over="ignore"):  # seen as an infinity by whoever checks
            features = [part.cpu().numpy().astype(np.float16) for part in launched.features]
        return EncodedBatch(batch, latents, features)

    def _store(self, batch: Decoded, moments: Tensor, view: int) -> StoredArray:
        """Moments (n, 2C, H, W), or a sample (n, C, H, W) of them, in the stored type."""
        if self.settings.representation == SAMPLE:
            mean, log_variance = moments.chunk(2, dim=1)
            noise = [self._noise(batch.task, number, view, mean.shape[1:]) for number in batch.items]
            moments = mean + torch.exp(0.5 * log_variance) * torch.stack(noise)
        with np.errstate(over="ignore"):  # seen as an infinity by whoever checks
            return moments.numpy().astype(self.settings.dtype)

    def _noise(self, task: int, number: int, view: int, shape: torch.Size) -> Tensor:
        seed = np.random.SeedSequence([self.settings.seed, task, number, view]).generate_state(1, np.uint64)[0]
        return torch.randn(shape, generator=torch.Generator().manual_seed(int(seed >> np.uint64(1))))
