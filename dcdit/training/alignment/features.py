"""Where alignment has the features of an encoder from: the shards, or the encoder itself."""

import torch
from torch import Tensor

from dcdit.checkpoints.encoder import AUTO, Encoder, EncoderKeys, encoder_cost, load_encoder
from dcdit.checkpoints.timm_models import RANDOM
from dcdit.checks import shown
from dcdit.data.latents import LatentSpec
from dcdit.data.manifest import Companion, EncoderIdentity, Manifest
from dcdit.errors import UserError
from dcdit.training.alignment.settings import EncoderSettings
from dcdit.training.auxiliary import Noisy

KEYS = EncoderKeys("alignment.encoder", "alignment.weights", "alignment.grid")


class Features:
    """The features of the images of a batch: those beside the latents, or computed by an encoder.

    Args:
        encoder: computes them, of the pixels beside the latents or of latents that are pixels; None where features lie
            beside the latents.
        latents: what the latents are.
        channels: features F of a patch.
        identity: what tells them from those of other encoders.
    """

    def __init__(self, encoder: Encoder | None, latents: LatentSpec, channels: int, identity: EncoderIdentity) -> None:
        self.encoder, self.latents, self.channels, self.identity = encoder, latents, channels, identity

    def __call__(self, noisy: Noisy) -> Tensor:
        """The features (B, F, h, w) of the images that ``noisy`` was made of."""
        if self.encoder is None:
            assert noisy.companion is not None
            return noisy.companion
        if noisy.companion is not None:
            return self.encoder(noisy.companion / 255)
        return self.encoder((self.latents.restored(noisy.latents) / 2 + 0.5).clamp(0, 1))

    def move(self, device: torch.device) -> None:
        """Move the encoder to a device."""
        if self.encoder is not None:
            self.encoder.to(device)


class TrialFeatures(Features):
    """Features of no images, which take the memory of those that ``settings`` ask for."""

    def __init__(self, settings: EncoderSettings) -> None:
        self.grid, self.encoder = settings.grid, None
        self.identity = EncoderIdentity(settings.encoder, "0" * 16, "random")
        self.channels = encoder_cost(settings.encoder, settings.grid, KEYS)[1]
        if settings.features == "computed":
            self.encoder = load_encoder(settings.encoder, RANDOM, settings.grid, KEYS)

    def __call__(self, noisy: Noisy) -> Tensor:
        """The features (B, F, h, w) of black images."""
        if self.encoder is None:
            return noisy.x.new_zeros(len(noisy.x), self.channels, self.grid, self.grid)
        return self.encoder(noisy.x.new_zeros(len(noisy.x), 3, self.encoder.side, self.encoder.side))


def features_of(settings: EncoderSettings, manifest: Manifest | None) -> Features:
    """The features of the images whose latents ``manifest`` describes; None takes black images, for a trial.

    Raises:
        UserError: if the encoder cannot be had, or the shards hold no pixels, or features of another encoder.
    """
    if manifest is None:
        return TrialFeatures(settings)
    if settings.features == "stored":
        companion = manifest.companion
        assert companion is not None
        return Features(None, manifest.spec, companion.shape[0], _check_stored(settings, companion))
    channels = manifest.latent_shape[0]
    if manifest.companion is None and channels not in (1, 3):
        raise UserError(
            f"alignment.features=computed: latents of {channels} channels are no pictures that an encoder could see;"
            " take other data, or alignment=dispersive"
        )
    encoder = load_encoder(settings.encoder, settings.weights, settings.grid, KEYS)
    return Features(encoder, manifest.spec, encoder.channels, encoder.identity)


def _check_stored(settings: EncoderSettings, companion: Companion) -> EncoderIdentity:
    """The encoder of stored features; UserError with both values unless ``settings`` name it."""
    stored, grid = companion.encoder, companion.shape[1]
    assert stored is not None
    if stored.name != settings.encoder:
        raise UserError(
            f"alignment.encoder={shown(settings.encoder)}, but the shards hold features of {shown(stored.name)}: set"
            f" alignment.encoder={stored.name}, or extract those of the other"
        )
    if grid != settings.grid:
        raise UserError(
            f"alignment.grid={settings.grid}, but the shards hold features of {grid} x {grid} patches: set"
            f" alignment.grid={grid}"
        )
    if settings.weights == AUTO == stored.origin:
        return stored  # what timm publishes need not be downloaded to be compared
    weights = "those of timm"
    if settings.weights != AUTO:
        weights = load_encoder(settings.encoder, settings.weights, settings.grid, KEYS).identity.weights
        if weights == stored.weights:
            return stored
    raise UserError(
        f"alignment.weights={shown(settings.weights)} are {weights}, but the shards hold features of weights"
        f" {stored.weights} ({stored.origin}): name these, or extract the features again"
    )
