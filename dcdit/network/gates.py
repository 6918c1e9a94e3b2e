"""Width gates: which attention heads, and which groups of MLP channels, run at a timestep (DyDiT, arXiv 2410.03456).

In training each sample has a timestep of its own, so that what is off is multiplied by 0. In sampling all samples have
the same timestep: what is off is left out of the weights, and costs nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dcdit.network.embeddings import PURE_NOISE

_OPEN = 4.0
"""Bias of all gates at the start: all are on, and of the noisy ones of training 98%."""


def group_count(heads: int, hidden: int) -> int:
    """Groups of the ``hidden`` channels of an MLP: as many as ``heads``, or the next smaller number that divides."""
    return next(number for number in range(heads, 0, -1) if hidden % number == 0)


@dataclass(frozen=True)
class BlockGates:
    """The gates of one transformer block.

    Attributes:
        heads: (B, heads), 1 for what runs and 0 for the rest; with the gradient of a sigmoid in training.
        groups: (B, groups), the same.
        kept: (n,) int64 numbers of the heads and of the groups that run; None where the rest is multiplied by 0.
    """

    heads: Tensor
    groups: Tensor
    kept: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Gating:
    """The gates of all blocks.

    Attributes:
        heads: (B, depth, heads), see :class:`BlockGates`; B is 1 where all samples have the same timestep.
        groups: (B, depth, groups).
        counts: for each block how many heads and groups run, on the host, where the rest is left out; None where it is
            multiplied by 0.
    """

    heads: Tensor
    groups: Tensor
    counts: tuple[tuple[int, int], ...] | None = None

    @property
    def shares(self) -> tuple[list[float], list[float]]:
        """For each block the shares of the heads and of the groups that run; in the mean over the samples."""
        kinds = self.heads, self.groups
        if self.counts is None:
            heads, groups = (gates.mean(dim=(0, 2)).tolist() for gates in kinds)
        else:  # on the host already
            running = zip(*self.counts, strict=True)
            heads, groups = ([n / gates.shape[2] for n in counts] for gates, counts in zip(kinds, running, strict=True))
        return heads, groups

    def block(self, number: int) -> BlockGates | None:
        """The gates of a block; None where all are on and nothing is to be done."""
        heads, groups = self.heads[:, number], self.groups[:, number]
        if self.counts is None:
            return BlockGates(heads, groups)
        if self.counts[number] == (heads.shape[1], groups.shape[1]):
            return None
        sizes = zip((heads, groups), self.counts[number], strict=True)
        first, second = (torch.nonzero_static(gates[0], size=size).squeeze(1) for gates, size in sizes)
        return BlockGates(heads, groups, (first, second))

    def of(self, samples: Tensor) -> "Gating":
        """The gates of these ``samples`` (n,) int64 alone."""
        return self if len(self.heads) == 1 else Gating(self.heads[samples], self.groups[samples], self.counts)


class Gates(nn.Module):
    """Decides by the timestep which heads and groups of every block run.

    Args:
        width: of the embedding of a timestep, D.
        depth: number of blocks.
        heads: of a block.
        groups: of the channels of its MLP.
    """

    def __init__(self, width: int, depth: int, heads: int, groups: int) -> None:
        super().__init__()
        self.depth, self.heads, self.groups = depth, heads, groups
        self.router = nn.Linear(width, depth * (heads + groups))
        nn.init.zeros_(self.router.weight)
        nn.init.constant_(self.router.bias, _OPEN)

    def forward(self, t: Tensor, embed: Callable[[Tensor], Tensor]) -> Gating:
        """The gates at timesteps ``t`` (B,), which ``embed`` maps to (B, D).

        Without gradients and outside training, samples of the same timestep share one decision, which the host reads.
        """
        if self.training:
            logits = self._logits(embed(t))
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = logits + uniform.log() - (1 - uniform).log()  # hard Gumbel sigmoid (arXiv 1611.00712)
            soft = logits.sigmoid()
            return self._split(self._hard(logits) - soft.detach() + soft)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._split(self._hard(self._logits(embed(t))))
        gates = self._hard(self._logits(embed(t[:1])))  # of one sample, so that rounding knows no batch
        heads, groups = (part[0].sum(dim=1) for part in gates.split((self.heads, self.groups), dim=2))
        same, *counts = torch.cat([(t == t[0]).all()[None], heads, groups]).int().tolist()  # the one read
        if not same:
            return self._split(self._hard(self._logits(embed(t))))
        return self._split(gates, tuple(zip(counts[: self.depth], counts[self.depth :], strict=True)))

    @torch.no_grad()
    def over_time(self, embed: nn.Module) -> Gating:
        """The gates at 101 timesteps from 0 to the largest, evenly spaced; ``embed`` as of :meth:`forward`."""
        first = next(embed.parameters())
        with torch.autocast(first.device.type, first.dtype, enabled=first.dtype != torch.float32):
            embedded = embed(torch.linspace(0, PURE_NOISE, 101, device=first.device))
        return self._split(self._hard(self._logits(embedded)))

    def _logits(self, embedded: Tensor) -> Tensor:
        """(B, D) to (B, depth, heads + groups), in float32."""
        with torch.autocast(embedded.device.type, enabled=False):
            return self.router(F.silu(embedded.float())).unflatten(1, (self.depth, self.heads + self.groups))

    def _hard(self, logits: Tensor) -> Tensor:
        """1 where a logit is positive, and at the largest of each block; 0 elsewhere."""
        parts = logits.detach().split((self.heads, self.groups), dim=2)
        return torch.cat([(part > 0) | (part == part.amax(dim=2, keepdim=True)) for part in parts], dim=2).float()

    def _split(self, gates: Tensor, counts: tuple[tuple[int, int], ...] | None = None) -> Gating:
        heads, groups = gates.split((self.heads, self.groups), dim=2)
        return Gating(heads, groups, counts)


def gates_of(blocks: Sequence[Any]) -> Gates:
    """Gates for these :class:`dcdit.network.blocks.DiTBlock`s, all on."""
    attention, mlp = blocks[0].attention, blocks[0].mlp
    width, hidden = mlp.fc2.out_features, mlp.fc2.in_features
    return Gates(width, len(blocks), attention.heads, group_count(attention.heads, hidden))


def run_block(block: Any, gating: Gating | None, number: int, *arguments: Any) -> Tensor:
    """Call a :class:`dcdit.network.blocks.DiTBlock`, number ``number`` of its network, as ``gating`` says."""
    gates = None if gating is None else gating.block(number)
    if gates is not None and gates.kept is not None:
        tokens: Tensor = functional_call(block, narrowed(block, *gates.kept), arguments)
    else:
        tokens = block(*arguments) if gates is None else block(*arguments, gates)
    return tokens


def narrowed(block: Any, heads: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """The weights of a block without the heads and groups that do not run, by name.

    Args:
        block: a :class:`dcdit.network.blocks.DiTBlock`.
        heads, groups: (n,) int64 numbers of those that run.
    """
    attention, mlp = block.attention, block.mlp
    stacked = getattr(mlp, "stacked", {}).get("fc1", 1)
    all_groups = group_count(attention.heads, mlp.fc2.in_features)
    state = {}
    for name, linear, parts, count, kept in (
        ("attention.qkv", attention.qkv, 3, attention.heads, heads),
        ("mlp.fc1", mlp.fc1, stacked, all_groups, groups),
    ):
        for kind, tensor in linear.named_parameters():
            rows = tensor.unflatten(0, (parts, count, -1)).index_select(1, kept)
            state[f"{name}.{kind}"] = rows.flatten(0, 2)
    for name, linear, count, kept in (
        ("attention.out", attention.out, attention.heads, heads),
        ("mlp.fc2", mlp.fc2, all_groups, groups),
    ):
        columns = linear.weight.unflatten(1, (count, -1)).index_select(1, kept)
        state[f"{name}.weight"] = columns.flatten(1)
    return state
