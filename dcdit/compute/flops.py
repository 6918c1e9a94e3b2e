"""Floating-point operations (FLOPs) of a forward pass, counted from outside in the paper's convention.

Two for each multiply-add of a matrix product or convolution; attention over M tokens takes
heads * M^2 * (4 d_head + 3), softmax included. Norms, activations and additions are not counted. De-chunking is counted
as the published dense form, 2 D M^2 per sample, although this package smooths on the grid for less. The residual
projection is counted, which the reference implementation's counter leaves out: :attr:`Flops.published` is without it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dcdit.errors import UserError
from dcdit.network import Component, Network
from dcdit.network.blocks import ConvBlock, DiTBlock, blocks_of
from dcdit.network.gates import Gating


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
    def of_network(cls, network: Network, gating: Gating | None = None) -> "Cost":
        """The cost of ``network``, constant if it does not route.

        Of a network with gates that of what ``gating`` lets run; in the mean over all timesteps if that is None.
        """
        running = running_shares(network, gating)
        return sum((cost_of(component, running) for component in network.components()), cls())

    def of(self, lengths: Tensor) -> Tensor:
        """FLOPs for each of ``lengths``, any shape, in float64."""
        tokens = lengths.double()
        return self.fixed - self.skipped * (tokens == 0) + self.linear * tokens + self.square * tokens**2

    def mean(self, lengths: Sequence[float]) -> float:
        """Mean FLOPs over samples of ``lengths`` tokens; none is for networks that do not route."""
        return self.of(torch.tensor(lengths or [0.0], dtype=torch.float64)).mean().item()


Shares = Mapping[nn.Module, tuple[float, float]]
"""Of transformer blocks, the shares of the heads and of the groups of MLP channels that run; all of those left out."""


def running_shares(network: Network, gating: Gating | None = None) -> Shares:
    """What ``gating`` lets run; if that is None, what the gates of ``network`` do in the mean over all timesteps.

    Nothing is known of a network on the meta device: there all of it runs.
    """
    gating = network.gating_over_time() if gating is None else gating
    if gating is None:
        return {}
    heads, groups = gating.shares
    return dict(zip(blocks_of(network), zip(heads, groups, strict=True), strict=True))


def _widths(block: DiTBlock) -> tuple[float, float, float]:
    """FLOPs of a block that its gates may spare: of the heads for each token and pair, of the MLP for each token."""
    attention = block.attention
    width, heads = attention.out.out_features, attention.heads
    return _weights(attention.modules()), heads * (4 * width / heads + 3), _weights(block.mlp.modules())


def cost_of(component: Component, running: Shares = MappingProxyType({})) -> Cost:
    """Count the FLOPs of a component as the paper does: 2 for each multiply-add; of its blocks what is ``running``."""
    per_token, once, square = 0.0, 0.0, 2 * component.pairs
    for module in component.modules:
        inner = list(module.modules())
        per_token += _weights(inner)
        # The conditioning of a block runs once per sample, whatever it is broadcast to.
        conditions: list[Any] = [block.condition for block in inner if isinstance(block, ConvBlock)]
        conditions += [block.modulation for block in inner if hasattr(block, "modulation")]
        apart = sum(_weights(condition.modules()) for condition in conditions)
        per_token, once = per_token - apart, once + apart
        for block in blocks_of(module):
            (heads, groups), (of_heads, of_pairs, of_groups) = running.get(block, (1.0, 1.0)), _widths(block)
            per_token -= (1 - heads) * of_heads + (1 - groups) * of_groups
            square += heads * of_pairs
    if component.runs is None:
        return Cost(once, per_token, square, once * component.skipped)
    return Cost(once + per_token * component.runs + square * component.runs**2)


def gated_share(network: Network, gating: Gating, lengths: Tensor) -> Tensor:
    """The share of the FLOPs of heads and MLPs that ran, a scalar with the gradient of the gates.

    Args:
        network: whose blocks are of one size.
        gating: of B samples.
        lengths: (B,) tokens of each sample.
    """
    of_heads, of_pairs, of_groups = _widths(blocks_of(network)[0])
    tokens = lengths.float()
    heads, groups = of_heads * tokens + of_pairs * tokens**2, of_groups * tokens  # (B,), of one block
    ran = heads * gating.heads.mean(dim=(1, 2)) + groups * gating.groups.mean(dim=(1, 2))
    return ran.sum() / (heads + groups).sum().clamp(min=1)


def least_and_most(network: Network, lengths: Sequence[float] = ()) -> tuple[float, float] | None:
    """FLOPs of a forward pass at the cheapest and at the dearest timestep; None where all cost the same.

    Args:
        network, lengths: as of :func:`count`.
    """
    gating = network.gating_over_time()
    if gating is None:
        return None
    gatings = [gating.of(torch.tensor([number])) for number in range(len(gating.heads))]
    costs = [Cost.of_network(network, one).mean(lengths) for one in gatings]
    return min(costs), max(costs)


def _weights(modules: Iterable[nn.Module]) -> float:
    """FLOPs of the Linear and convolution layers among ``modules`` for one position of their input."""
    layers = [layer for layer in modules if isinstance(layer, nn.Linear | nn.Conv2d)]
    return 2.0 * sum(layer.weight.numel() for layer in layers)


def count(network: Network, lengths: Sequence[float] = ()) -> Flops:
    """FLOPs of one forward pass, for one sample; with gates in the mean over all timesteps.

    Args:
        network: on the meta device if need be.
        lengths: tokens that a network that routes keeps, for each of a set of samples over which to average.

    Raises:
        UserError: if a network that routes comes without lengths.
    """
    if network.routes and not len(lengths):
        raise UserError(f"lengths=[]: what {network.title} costs depends on the tokens that it keeps")
    components, running = network.components(), running_shares(network)
    return Flops(
        {component.name: cost_of(component, running).mean(lengths) for component in components},
        frozenset(component.name for component in components if not component.counted_by_paper),
    )
