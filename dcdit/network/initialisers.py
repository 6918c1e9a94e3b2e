"""Initialisers applied where a layer is constructed: ``self.fc = zero_init(nn.Linear(4, 4))``."""

from typing import Literal, TypeVar

from torch import nn

InitScheme = Literal["released", "paper"]
"""``released``: what the published numbers came from. ``paper``: what the paper intends (adaLN-Zero, zero residual)."""

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d | nn.Embedding)


def _zero_bias(layer: Layer) -> Layer:
    bias = getattr(layer, "bias", None)
    if bias is not None:
        nn.init.zeros_(bias)
    return layer


def xavier_init(layer: Layer) -> Layer:
    """Draw a Xavier-uniform weight (a convolution kernel counts as its flattened matrix), and set the bias to zero."""
    nn.init.xavier_uniform_(layer.weight.data.flatten(1))
    return _zero_bias(layer)


def zero_init(layer: Layer) -> Layer:
    """Set weight and bias to zero."""
    nn.init.zeros_(layer.weight)
    return _zero_bias(layer)


def normal_init(layer: Layer, std: float = 0.02) -> Layer:
    """Draw a normal weight and set the bias to zero."""
    nn.init.normal_(layer.weight, std=std)
    return _zero_bias(layer)


def constant_init(layer: nn.Conv2d, bias: float) -> nn.Conv2d:
    """Set the bias to a constant; the weight stays at PyTorch's default."""
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
    return layer
