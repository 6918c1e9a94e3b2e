"""The packed sequence: the kept tokens of all samples, one after the other, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How the samples of a batch lie in a packed sequence of T tokens.

    Attributes:
        cu_seqlens: (B + 1,) int32, sample b owns tokens ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        sample: (T,) int64, the sample that owns each token.
        index: (T,) int64, position of each token in the flattened (B * L) grid, ascending.
        lengths: the B sample lengths on the host.
        bound: static upper bound of a length (the number of grid positions L).
    """

    cu_seqlens: Tensor
    sample: Tensor
    index: Tensor
    lengths: tuple[int, ...]
    bound: int


def make_packing(mask: Tensor, known: Sequence[int] | None = None) -> Packing:
    """Lay the kept positions of ``mask`` (B, L) out one sample after the other, each in raster order.

    Costs the only device-to-host read of a forward pass (the B lengths), unless they are ``known``.
    """
    batch, positions = mask.shape
    lengths = mask.sum(dim=1)
    host_lengths = tuple(lengths.tolist() if known is None else known)
    index = torch.nonzero_static(mask.flatten(), size=sum(host_lengths)).squeeze(1)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    return Packing(cu_seqlens, index // positions, index, host_lengths, positions)


def full_packing(batch: int, positions: int, device: torch.device) -> Packing:
    """The packing that keeps every position of every sample; reads nothing from the device."""
    index = torch.arange(batch * positions, device=device)
    cu_seqlens = torch.arange(0, batch * positions + 1, positions, dtype=torch.int32, device=device)
    return Packing(cu_seqlens, index // positions, index, (positions,) * batch, positions)


def pack(grid: Tensor, packing: Packing) -> Tensor:
    """Gather the kept positions of ``grid`` (B, L, ...) as (T, ...)."""
    return grid.flatten(0, 1).index_select(0, packing.index)
