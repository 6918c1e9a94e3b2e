"""Floating-point operations (FLOPs) of a forward pass, counted from outside in the paper's convention.

Two for each multiply-add of a matrix product or convolution; attention over M tokens takes
heads * M^2 * (4 d_head + 3), softmax included. Norms, activations and additions are not counted. De-chunking is counted
as the published dense form, 2 D M^2 per sample, although this package smooths on the grid for less. The residual
projection is counted, which the reference implementation's counter leaves out: :attr:`Flops.published` is without it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcdit.errors import UserError
from dcdit.network import Component, Network
from dcdit.network.blocks import ConvBlock, DiTBlock


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass, for one sample.

    Attributes:
        components: FLOPs by component, in the order of the forward pass.
        unpublished: names of the components that the published figures leave out.
    """

    components: Mapping[str, float]
    unpublished: frozenset[str] = frozenset()

    @property
    def total(self) -> float:
        """Return the sum of all components, in FLOPs per sample."""
        return sum(self.components.values())

    @property
    def published(self) -> float:
        """The total as the paper counts."""
        return self.total - sum(self.components[name] for name in self.unpublished)


@dataclass(frozen=True)
class Cost:
    """FLOPs of a forward pass as a function of the tokens M that run: ``fixed + linear * M + square * M^2``.

    Attributes:
        fixed, linear, square: its coefficients.
        skipped: how much of ``fixed`` is spared where no token runs.
    """

    fixed: float = 0.0
    linear: float = 0.0
    square: float = 0.0
    skipped: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of_network(cls, network: Network) -> "Cost":
        """The cost of ``network``; constant if it does not route."""
        return sum((cost_of(component) for component in network.components()), cls())

    def of(self, lengths: Tensor) -> Tensor:
        """FLOPs for each of ``lengths``, any shape, in float64."""
        tokens = lengths.double()
        return self.fixed - self.skipped * (tokens == 0) + self.linear * tokens + self.square * tokens**2

    def mean(self, lengths: Sequence[float]) -> float:
        """Mean FLOPs over samples of ``lengths`` tokens; none is for networks that do not route."""
        return self.of(torch.tensor(lengths or [0.0], dtype=torch.float64)).mean().item()


def cost_of(component: Component) -> Cost:
    """Count the FLOPs of a component as the paper does: 2 for each multiply-add."""
    each, once, square = 0.0, 0.0, 2 * component.pairs
    for module in component.modules:
        inner = list(module.modules())
        each += _weights(inner)
        # The conditioning of a block runs once per sample, whatever it is broadcast to.
        conditions: list[Any] = [block.condition for block in inner if isinstance(block, ConvBlock)]
        conditions += [block.modulation for block in inner if hasattr(block, "modulation")]
        apart = sum(_weights(condition.modules()) for condition in conditions)
        each, once = each - apart, once + apart
        for block in inner:
            if isinstance(block, DiTBlock):
                width, heads = block.attention.qkv.in_features, block.attention.heads
                square += heads * (4 * width / heads + 3)
    if component.runs is None:
        return Cost(once, each, square, once * component.skipped)
    return Cost(once + each * component.runs + square * component.runs**2)


def _weights(modules: Iterable[nn.Module]) -> float:
    """FLOPs of the Linear and convolution layers among ``modules`` for one position of their input."""
    layers = [layer for layer in modules if isinstance(layer, nn.Linear | nn.Conv2d)]
    return 2.0 * sum(layer.weight.numel() for layer in layers)


def count(network: Network, lengths: Sequence[float] = ()) -> Flops:
    """FLOPs of one forward pass, for one sample.

    Args:
        network: on the meta device if need be.
        lengths: tokens that a network that routes keeps, for each of a set of samples over which to average.

    Raises:
        UserError: if a network that routes comes without lengths.
    """
    if network.routes and not len(lengths):
        raise UserError(f"lengths=[]: what {network.title} costs depends on the tokens that it keeps")
    components = network.components()
    return Flops(
        {component.name: cost_of(component).mean(lengths) for component in components},
        frozenset(component.name for component in components if not component.counted_by_paper),
    )
