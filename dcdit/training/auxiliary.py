"""Losses on hidden states that training adds to the diffusion loss, and the recording of hidden states."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dcdit.network import Routing
from dcdit.network.blocks import blocks_of
from dcdit.network.packing import Packing


@dataclass(frozen=True)
class Noisy:
    """A batch on its way to noise.

    Attributes:
        x: (B, C, H, W) noisy latents.
        t: (B,) timesteps.
        labels: (B,), as the network sees them.
        latents, noise: what ``x`` is made of.
        companion: what the shards hold beside the latents, see :class:`dcdit.data.stream.Batch`.
    """

    x: Tensor
    t: Tensor
    labels: Tensor
    latents: Tensor
    noise: Tensor
    companion: Tensor | None = None


@dataclass
class HiddenStates:
    """Hidden states of one forward pass.

    Attributes:
        tokens: (T, D) after the block of this number; 0 stands for the tokens before the first block.
        packing: the positions of the tokens.
    """

    tokens: dict[int, Tensor] = field(default_factory=dict)
    packing: Packing | None = None


@contextmanager
def record_hidden_states(network: nn.Module, wanted: Collection[int] | None = None) -> Iterator[HiddenStates]:
    """Record hidden states of ``network`` in the forward pass that runs within the context.

    Args:
        network: with transformer blocks.
        wanted: which, see :attr:`HiddenStates.tokens`; None records all of them.
    """
    blocks, states = blocks_of(network), HiddenStates()
    numbers = range(len(blocks) + 1) if wanted is None else wanted

    def record_input(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        states.tokens[0], states.packing = arguments[0], arguments[2]

    def record_output(number: int, arguments: tuple[Any, ...], output: Tensor) -> None:
        states.tokens[number], states.packing = output, arguments[2]

    hooks = [blocks[0].register_forward_pre_hook(record_input)] if 0 in numbers else []
    for number, block in enumerate(blocks, 1):
        if number in numbers:
            hooks.append(
                block.register_forward_hook(lambda _, arguments, output, n=number: record_output(n, arguments, output))
            )
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


class AuxiliaryLoss(ABC):
    """A loss on hidden states beside the diffusion loss.

    Attributes:
        metric: the name under which it is logged.
        states: numbers of the hidden states that it needs, see :attr:`HiddenStates.tokens`.
    """

    metric: ClassVar[str]
    states: Collection[int]

    @abstractmethod
    def weight_at(self, step: int) -> float:
        """The weight of the loss at an optimiser step. After the first step at which it is 0 the loss is let go."""

    @abstractmethod
    def loss(self, hidden: HiddenStates, noisy: Noisy, routing: Routing | None) -> Tensor:
        """The loss of a batch, a float32 scalar.

        Args:
            hidden: hidden states of the network that is trained, for ``noisy``.
            noisy: the batch.
            routing: the decision of the network's router; None for a network without one.
        """

    @abstractmethod
    def move(self, device: torch.device) -> None:
        """Move to a device what is no parameter of the trained module."""


def mean_over_tokens(values: Tensor, packing: Packing) -> Tensor:
    """The mean of ``values`` (T, ...) of tokens, a scalar; padding counts for nothing."""
    if packing.valid is None:
        return values.mean()
    per_token = values.flatten(1).mean(dim=1) if values.dim() > 1 else values
    return (per_token * packing.valid).sum() / packing.valid.sum()


def covering(index: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The patch that covers each position of a grid.

    Args:
        index: (T,) positions in the flattened (B * H * W) grid.
        grid: (H, W).
        patch: side of a patch.

    Returns:
        (T,) indices into the flattened (B * H / patch * W / patch) patches.
    """
    height, width = grid
    sample, position = index // (height * width), index % (height * width)
    row, column = position // width // patch, position % width // patch
    return (sample * (height // patch) + row) * (width // patch) + column
