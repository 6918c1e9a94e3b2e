"""Pretrained encoders of images, whose patch features training aligns hidden states with."""

import shlex
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcdit.checkpoints.timm_models import RANDOM, create_timm_model, fit_timm_model, read_model_weights
from dcdit.checks import reason_of
from dcdit.data.manifest import EncoderIdentity
from dcdit.errors import UserError
from dcdit.runtime.devices import autocast, fingerprint, without_memory

AUTO = "auto"
"""Weights that timm publishes."""

DIGITS_ENCODER = "test_vit"
"""timm's name of the model that ``scripts/train_digits_encoder.py`` trains."""


class EncoderKeys(NamedTuple):
    """The keys that a user describes an encoder with, for messages."""

    model: str
    weights: str
    grid: str


class Encoder:
    """A frozen image model of timm: images to the features of patches, without class and register tokens.

    Args:
        network: the model, in evaluation mode, for images of its own size.
        identity: what tells its features from those of others.
        grid: patches along a side of an image.
        side: of the images that it sees, in pixels.

    Attributes:
        channels: features F of a patch.
    """

    def __init__(self, network: Any, identity: EncoderIdentity, grid: int, side: int) -> None:
        from timm.data import resolve_model_data_config

        self.network, self.identity, self.grid, self.side = network, identity, grid, side
        config = resolve_model_data_config(network)
        self._mean, self._std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        self.channels = int(network.feature_info[-1]["num_chs"])

    def to(self, device: torch.device) -> "Encoder":
        """Move to a device; returns itself."""
        self.network.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """:meth:`features`, without gradients."""
        return self.features(images)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, F, grid, grid) of images (B, 1 or 3, height, width) with values in [0, 1].

        Images are resized (bicubic, antialiased) to the size at which the encoder has ``grid`` patches along a side.
        """
        size = (self.side, self.side)
        pixels = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        normalised = (pixels.expand(-1, 3, -1, -1) - self._mean) / self._std
        (features,) = self.network.forward_intermediates(
            normalised, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return features

    def see(self, images: Tensor, precision: str) -> Tensor:
        """Features (B, F, grid, grid) of images (B, 3, height, width) uint8 of any device.

        Args:
            images: the images.
            precision: ``fp32``, or ``bf16`` or ``fp16`` for autocast.
        """
        device = self._mean.device
        with autocast(precision, device):
            return self(images.to(device) / 255).float()


def load_encoder(model: str, weights: str, grid: int, keys: EncoderKeys) -> Encoder:
    """A pretrained encoder that has ``grid`` patches along a side of an image.

    Args:
        model: timm's name, such as ``vit_base_patch14_dinov2.lvd142m``.
        weights: ``auto`` downloads what timm publishes; a local file (.safetensors or torch); ``random`` for none.
        grid: patches along a side.
        keys: names of these, for messages.

    Raises:
        UserError: if there is no such model, its weights cannot be had, or it has no such patches.
    """
    origin: Literal["auto", "file", "random"] = "auto" if weights == AUTO else "random" if weights == RANDOM else "file"
    remedy = f"give a local file as {keys.weights}=..., or {keys.weights}=random for weights that were never trained"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same in every process and every run
        network = create_timm_model(model, keys.model, remedy, pretrained=weights == AUTO, num_classes=0)
    try:
        side = grid * int(network.feature_info[-1]["reduction"])
        state = None
        if origin == "file":
            names = network.state_dict().keys()
            state = read_model_weights(weights, keys.weights, names, _remedy_of(model, weights))
        fit_timm_model(network, state, side)
        encoder = Encoder(
            network.eval().requires_grad_(False), EncoderIdentity(model, fingerprint(network), origin), grid, side
        )
        shape = tuple(encoder(torch.zeros(1, 3, side, side)).shape)
    except UserError as error:
        text = str(error)
        raise UserError(text if weights in text else f"{keys.weights}={weights} do not fit {model}: {text}") from error
    except Exception as error:  # timm's models differ
        raise UserError(
            f"{keys.model}={model!r} gives no features of {grid} x {grid} patches ({reason_of(error)}): take a vision"
            " transformer, such as vit_base_patch14_dinov2.lvd142m"
        ) from error
    if shape != (1, encoder.channels, grid, grid):
        raise UserError(
            f"{keys.grid}={grid}: {model} has {' x '.join(map(str, shape[2:]))} patches in images of {side} x {side}:"
            " take a vision transformer, such as vit_base_patch14_dinov2.lvd142m"
        )
    return encoder


def _remedy_of(model: str, weights: str) -> str:
    """What to do where there is no file of weights."""
    if model == DIGITS_ENCODER:
        script = shlex.join(["python", "scripts/train_digits_encoder.py", weights])
        return f"`{script}` trains one for digits in a minute"
    return "give one that holds the weights of the model"


def encoder_cost(model: str, grid: int, keys: EncoderKeys) -> tuple[float, int]:
    """FLOPs of the features of an image, and the features of a patch; takes no memory.

    Two FLOPs are counted for each multiply-add, as :mod:`dcdit.compute.flops` does.

    Raises:
        UserError: if there is no such model.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with without_memory(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network = create_timm_model(model, keys.model, "", pretrained=False, num_classes=0)
        side = grid * int(network.feature_info[-1]["reduction"])
        fit_timm_model(network, None, side)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, side, side))
    return float(counter.get_total_flops()), int(network.feature_info[-1]["num_chs"])
