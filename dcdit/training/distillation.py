"""Distillation: the hidden states of a DC-DiT are matched with those of a plain DiT (paper, section 4.4)."""

import torch
from torch import Tensor
from typing_extensions import override

from dcdit.network import DiT, Routing
from dcdit.network.blocks import blocks_of
from dcdit.training.auxiliary import (
    AuxiliaryLoss,
    HiddenStates,
    Noisy,
    covering,
    mean_over_tokens,
    record_hidden_states,
)


class Distillation(AuxiliaryLoss):
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

    metric = "train/distil_loss"

    def __init__(self, teacher: DiT, steps: int, weight: float, decay: bool) -> None:
        self.states = range(len(blocks_of(teacher)) + 1)
        self.teacher, self.steps, self.weight, self.decay = teacher, steps, weight, decay

    def __deepcopy__(self, memo: object) -> "Distillation":
        return self  # an average of weights copies the module, but needs no teacher

    @override
    def move(self, device: torch.device) -> None:
        self.teacher.to(device)

    @override
    def weight_at(self, step: int) -> float:
        if step >= self.steps:
            return 0.0
        return self.weight * (1 - step / self.steps) if self.decay else self.weight

    @override
    def loss(self, hidden: HiddenStates, noisy: Noisy, routing: Routing | None) -> Tensor:
        """Mean over the layers of the normalised squared error at the kept positions."""
        assert hidden.packing is not None
        with torch.no_grad(), record_hidden_states(self.teacher) as teacher:
            self.teacher(noisy.x, noisy.t, noisy.labels)
        tokens = covering(hidden.packing.index, self.teacher.grid, self.teacher.patch)
        total = noisy.x.new_zeros((), dtype=torch.float32)
        with torch.autocast(noisy.x.device.type, enabled=False):
            for number, theirs in teacher.tokens.items():
                ours, target = hidden.tokens[number].float(), theirs.float().index_select(0, tokens)
                error = mean_over_tokens((ours - target).square(), hidden.packing)
                total = total + error / theirs.float().square().mean()
        return total / len(teacher.tokens)
