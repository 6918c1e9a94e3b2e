"""Floating-point operations of a forward pass, counted from outside in the paper's convention.

Two for each multiply-add of a matrix product or convolution; attention over M tokens takes
heads * M^2 * (4 d_head + 3), softmax included. Norms, activations and additions are not counted. De-chunking is counted
as the published dense form, 2 D M^2 per sample, although this package smooths on the grid for less. r, the Linear of
the encoder's residual, is counted, which the reference's counter leaves out: :attr:`Flops.published` is without it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dcdit.errors import UserError
from dcdit.network import DCDiT, DiT

RESIDUAL = "residual Linear r"


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass, for one sample.

    Attributes:
        components: operations by component, in the order of the forward pass.
    """

    components: Mapping[str, float]

    @property
    def total(self) -> float:
        """All components."""
        return sum(self.components.values())

    @property
    def published(self) -> float:
        """The total as the paper counts, without r's Linear."""
        return self.total - self.components.get(RESIDUAL, 0.0)


def _per_position(*modules: nn.Module) -> float:
    """Operations of all Linear and convolution layers within ``modules`` for one position of their input."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return 2.0 * sum(layer.weight.numel() for layer in layers)


def _stack(blocks: Iterable[Any], positions: int) -> float:
    """Convolution blocks on a grid; their conditioning runs once per sample."""
    blocks = list(blocks)
    condition = sum(_per_position(block.condition) for block in blocks)
    return (_per_position(*blocks) - condition) * positions + condition


def _transformer(blocks: Iterable[Any], lengths: Sequence[float]) -> float:
    """Transformer blocks, mean over samples of the given lengths; their modulation runs once per sample."""
    mean = sum(lengths) / len(lengths)
    square = sum(length**2 for length in lengths) / len(lengths)
    total = 0.0
    for block in blocks:
        width, heads = block.attention.qkv.in_features, block.attention.heads
        total += _per_position(block.modulation) + _per_position(block.attention, block.mlp) * mean
        total += heads * square * (4 * width / heads + 3)
    return total


def count(network: nn.Module, lengths: Sequence[float] = ()) -> Flops:
    """Operations of one forward pass, for one sample.

    Args:
        network: a :class:`DCDiT` or :class:`DiT`; on the meta device if need be.
        lengths: tokens that a DC-DiT keeps, for each of a set of samples over which to average.

    Raises:
        UserError: if the network is of another kind, or a DC-DiT comes without lengths.
    """
    if isinstance(network, DCDiT):
        if not len(lengths):
            raise UserError("lengths=[]: what a DC-DiT costs depends on the tokens that it keeps")
        return Flops(dict(_dcdit(network, lengths)))
    if isinstance(network, DiT):
        return Flops(dict(_dit(network)))
    raise UserError(f"{type(network).__name__} is no network whose operations can be counted")


@dataclass(frozen=True)
class Cost:
    """Operations of a forward pass as a function of the tokens kept: ``fixed + linear * M + square * M^2``.

    Attributes:
        fixed, linear, square: its coefficients.
    """

    fixed: float
    linear: float
    square: float

    @classmethod
    def of_network(cls, network: nn.Module) -> "Cost":
        """The cost of ``network``; constant for a plain DiT. Raises like :func:`count`."""
        none, one, two = (count(network, [length]).total for length in (0.0, 1.0, 2.0))
        square = (two - 2 * one + none) / 2
        return cls(none, one - none - square, square)

    def of(self, lengths: Tensor) -> Tensor:
        """Operations for each of ``lengths``, any shape, in float64."""
        tokens = lengths.double()
        return self.fixed + self.linear * tokens + self.square * tokens**2


def _dcdit(network: DCDiT, lengths: Sequence[float]) -> Iterator[tuple[str, float]]:
    positions = network.grid[0] * network.grid[1]
    width = network.residual.in_features
    square = sum(length**2 for length in lengths) / len(lengths)
    yield "embedding", _per_position(network.embed) * positions
    yield "conditioning", _per_position(network.condition)
    yield "encoder", _stack(network.encoder.blocks, positions)
    yield RESIDUAL, _per_position(network.residual) * positions
    yield "router", _per_position(network.router) * positions
    yield "backbone", _transformer(network.backbone.blocks, lengths)
    yield "de-chunk", 2 * width * square if network.smoothing_sigma is not None else 0.0
    yield "decoder", _stack(network.decoder.blocks, positions)
    yield "output", _per_position(network.output.linear) * positions + _per_position(network.output.modulation)


def _dit(network: DiT) -> Iterator[tuple[str, float]]:
    tokens = (network.grid[0] // network.patch) * (network.grid[1] // network.patch)
    yield "embedding", _per_position(network.embed) * tokens
    yield "conditioning", _per_position(network.condition)
    yield "backbone", _transformer(network.blocks, [tokens])
    yield "output", _per_position(network.output.linear) * tokens + _per_position(network.output.modulation)
