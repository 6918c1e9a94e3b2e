"""From the settings of an alignment to its loss, and what it costs."""

import math

from torch import nn

from dcdit.checkpoints.encoder import encoder_cost
from dcdit.compute.flops import Cost
from dcdit.data.manifest import Manifest
from dcdit.network import Network
from dcdit.network.blocks import blocks_of
from dcdit.training.alignment.features import KEYS, features_of
from dcdit.training.alignment.losses import DispersiveLoss, GridAlignment, TokenAlignment, mlp
from dcdit.training.alignment.settings import IREPA, REPA, AlignmentSettings, BlockSettings, Dispersive, NoAlignment


def build_nothing(settings: NoAlignment, network: Network, manifest: Manifest | None) -> None:
    """Build no loss, for training without alignment."""


def build_repa(settings: REPA, network: Network, manifest: Manifest | None) -> TokenAlignment:
    """The loss of REPA, see :meth:`AlignmentSettings.build`."""
    features = features_of(settings, manifest)
    projector = mlp(_width(network), settings.width, features.channels)
    return TokenAlignment(projector, features, network.token_grid, _block(settings, network), settings.weight)


def build_irepa(settings: IREPA, network: Network, manifest: Manifest | None) -> GridAlignment:
    """The loss of iREPA, see :meth:`AlignmentSettings.build`."""
    features = features_of(settings, manifest)
    projector = nn.Conv2d(_width(network), features.channels, 3, padding=1)
    sigma = getattr(network, "smoothing_sigma", None)
    return GridAlignment(projector, features, network.token_grid, sigma, _block(settings, network), settings.weight)


def build_dispersive(settings: Dispersive, network: Network, manifest: Manifest | None) -> DispersiveLoss:
    """The dispersive loss, see :meth:`AlignmentSettings.build`."""
    return DispersiveLoss(settings.temperature, _block(settings, network), settings.weight)


def _block(settings: BlockSettings, network: Network) -> int:
    """The number of the block whose tokens are aligned."""
    return settings.block_of(len(blocks_of(network)))


def _width(network: Network) -> int:
    """The width of the tokens of a network."""
    return blocks_of(network)[0].attention.qkv.in_features


def cost_of_alignment(settings: AlignmentSettings, network: Network) -> Cost:
    """What alignment adds to a training step, in FLOPs of forward passes as :mod:`dcdit.compute.matching` counts them.

    A step costs three forward passes of what it trains. An encoder that runs costs one, of which a third is counted.
    """
    if not isinstance(settings, REPA | IREPA):
        return Cost()  # pairs of samples cost nothing beside the network
    flops, channels = encoder_cost(settings.encoder, settings.grid, KEYS)
    encoder, width = flops / 3 if settings.features == "computed" else 0.0, _width(network)
    if isinstance(settings, IREPA):
        return Cost(encoder + 2 * 9 * width * channels * settings.grid**2)
    per_token = 2 * (width * settings.width + settings.width**2 + settings.width * channels)
    return Cost(encoder, per_token) if network.routes else Cost(encoder + per_token * math.prod(network.token_grid))
