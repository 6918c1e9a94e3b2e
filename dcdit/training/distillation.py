"""Distillation: the hidden states of a DC-DiT are matched with those of a plain DiT (paper, section 4.4)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcdit.network import DiT
from dcdit.network.blocks import DiTBlock
from dcdit.network.packing import Packing


@dataclass
class HiddenStates:
    """The tokens before the first block of a network and after each block, of one forward pass.

    Attributes:
        tokens: depth + 1 tensors (T, D).
        packing: the positions of the tokens.
    """

    tokens: list[Tensor]
    packing: Packing | None = None


@contextmanager
def record_hidden_states(network: nn.Module) -> Iterator[HiddenStates]:
    """Record the hidden states of ``network`` in the forward pass that runs within the context."""
    states = HiddenStates([])

    def record(block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if not states.tokens:
            states.tokens.append(arguments[0])
            states.packing = arguments[2]
        states.tokens.append(output)

    hooks = [block.register_forward_hook(record) for block in network.modules() if isinstance(block, DiTBlock)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


class Distillation:
    """The loss between the hidden states of a DC-DiT and those of the plain DiT that it was made of.

    The student keeps positions of the fine grid, the teacher has one token for each patch. A kept position is compared
    with the token that covers it. The squared error of each layer is divided by the mean square of the teacher's
    states, so that all layers weigh the same.

    Args:
        teacher: frozen, in evaluation mode.
        steps: optimiser steps in which hidden states are matched.
        weight: of the loss at the first step.
        decay: whether the weight falls linearly to 0 over these steps.
    """

    def __init__(self, teacher: DiT, steps: int, weight: float, decay: bool) -> None:
        self.teacher, self.steps, self.weight, self.decay = teacher, steps, weight, decay

    def __deepcopy__(self, memo: object) -> "Distillation":
        return self  # an average of weights copies the module, but needs no teacher

    def weight_at(self, step: int) -> float:
        """The weight of the loss at an optimiser step."""
        if step >= self.steps:
            return 0.0
        return self.weight * (1 - step / self.steps) if self.decay else self.weight

    def loss(self, student: HiddenStates, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Mean over the layers of the normalised squared error at the kept positions.

        Args:
            student: its hidden states for the same ``x``, ``t`` and ``y``.
            x: (B, C, H, W) noisy latents.
            t: (B,) timesteps.
            y: (B,) labels, dropped ones already replaced.
        """
        assert student.packing is not None
        with torch.no_grad(), record_hidden_states(self.teacher) as teacher:
            self.teacher(x, t, y)
        tokens = covering(student.packing.index, self.teacher.grid, self.teacher.patch)
        total = x.new_zeros((), dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            for ours, theirs in zip(student.tokens, teacher.tokens, strict=True):
                target = theirs.float().index_select(0, tokens)
                total = total + (ours.float() - target).square().mean() / theirs.float().square().mean()
        return total / len(teacher.tokens)


def covering(index: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The token of a network with patches that covers each position of a grid.

    Args:
        index: (T,) positions in the flattened (B * H * W) grid.
        grid: (H, W).
        patch: side of a patch.

    Returns:
        (T,) indices into the flattened (B * H / patch * W / patch) tokens.
    """
    height, width = grid
    sample, position = index // (height * width), index % (height * width)
    row, column = position // width // patch, position % width // patch
    return (sample * (height // patch) + row) * (width // patch) + column
