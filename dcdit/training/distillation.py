"""Matching the hidden states of a plain DiT, while a DC-DiT is made of it (paper, section 4.4)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcdit.network import DiT
from dcdit.network.blocks import DiTBlock
from dcdit.network.packing import Packing


@dataclass
class HiddenStates:
    """What goes into the first block of a network and comes out of each, during one forward pass.

    Attributes:
        tokens: depth + 1 tensors (T, D).
        packing: where the tokens lie.
    """

    tokens: list[Tensor]
    packing: Packing | None = None


@contextmanager
def recorded(network: nn.Module) -> Iterator[HiddenStates]:
    """Watch the blocks of ``network`` from outside while the block runs."""
    found = HiddenStates([])

    def note(block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if not found.tokens:
            found.tokens.append(arguments[0])
            found.packing = arguments[2]
        found.tokens.append(output)

    hooks = [block.register_forward_hook(note) for block in network.modules() if isinstance(block, DiTBlock)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class Distillation:
    """The loss between the hidden states of a DC-DiT and those of the plain DiT that it was made of.

    The student keeps positions of the fine grid, the teacher has one token for each patch: a kept position is compared
    with the token that covers it. Each layer counts alike, its squared error over the mean square of the teacher's.

    Args:
        teacher: frozen, in evaluation mode.
        steps: optimiser steps over which it is matched.
        weight: of the loss at first.
        decay: whether it falls linearly to 0 over these steps.
    """

    def __init__(self, teacher: DiT, steps: int, weight: float, decay: bool) -> None:
        self.teacher, self.steps, self.weight, self.decay = teacher, steps, weight, decay

    def __deepcopy__(self, memo: Any) -> "Distillation":
        return self  # an average of weights copies the module, but needs no teacher

    def weight_at(self, step: int) -> float:
        """Weight of the loss at an optimiser step."""
        if step >= self.steps:
            return 0.0
        return self.weight * (1 - step / self.steps) if self.decay else self.weight

    def to(self, device: torch.device) -> None:
        """Move the teacher."""
        self.teacher.to(device)

    def loss(self, student: HiddenStates, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Mean over the layers of the normalised squared error at the kept positions.

        Args:
            student: its hidden states for the same ``x``, ``t`` and ``y``.
            x: (B, C, H, W) noisy latents.
            t: (B,) timesteps.
            y: (B,) labels, dropped ones already replaced.
        """
        assert student.packing is not None
        with torch.no_grad(), recorded(self.teacher) as wanted:
            self.teacher(x, t, y)
        tokens = covering(student.packing.index, self.teacher.grid, self.teacher.patch)
        total = x.new_zeros((), dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            for ours, theirs in zip(student.tokens, wanted.tokens, strict=True):
                target = theirs.float().index_select(0, tokens)
                total = total + (ours.float() - target).square().mean() / theirs.float().square().mean()
        return total / len(wanted.tokens)


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
    sample, place = index // (height * width), index % (height * width)
    row, column = place // width // patch, place % width // patch
    return (sample * (height // patch) + row) * (width // patch) + column


def watched(distillation: Distillation | None, network: nn.Module, step: int) -> Any:
    """:func:`recorded` while hidden states are matched; else a context that does nothing."""
    active = distillation is not None and distillation.weight_at(step) > 0
    return recorded(network) if active else nullcontext(None)
