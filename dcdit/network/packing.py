"""The packed sequence: the kept tokens of all samples, one after the other, without padding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How the samples of a batch lie in a packed sequence of T tokens.

    Tokens attend within segments. The first B segments are the samples; more of them hold the padding of a packing of
    fixed size, whose tokens repeat the last position of the batch, and whose results go nowhere.

    Attributes:
        cu_seqlens: (segments + 1,) int32, segment s owns tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``.
        sample: (T,) int64, the sample that owns each token.
        index: (T,) int64, position of each token in the flattened (B * L) grid, ascending.
        lengths: the lengths of the segments on the host; () where the host does not read them.
        bound: static upper bound of a length (the number of grid positions L).
        batch: number of samples B.
        valid: (T,) bool, False for padding; None where there is none.
    """

    cu_seqlens: Tensor
    sample: Tensor
    index: Tensor
    lengths: tuple[int, ...]
    bound: int
    batch: int
    valid: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """(T,) int64, the position of each token on the grid of its sample, 0 to L - 1."""
        return self.index % self.bound


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
    return Packing(cu_seqlens, index // positions, index, host_lengths, positions, batch)


def make_static_packing(mask: Tensor, size: int) -> Packing:
    """Lay the kept positions of ``mask`` (B, L) out in a padded packing of ``size`` tokens; a GPU is not read from.

    Args:
        mask: (B, L) bool.
        size: number of tokens, at least as many as ``mask`` keeps.
    """
    batch, positions = mask.shape
    ends = mask.sum(dim=1).cumsum(0)  # (B,)
    index = torch.nonzero_static(mask.flatten(), size=size, fill_value=batch * positions - 1).squeeze(1)
    padding = torch.arange(1, -(-size // positions) + 1, device=mask.device) * positions  # segments of at most L
    borders = [ends.new_zeros(1), ends, (ends[-1] + padding).clamp(max=size)]
    cu_seqlens = torch.cat(borders).to(torch.int32)
    known = mask.device.type == "cpu" and not torch.compiler.is_compiling()  # where reading them costs nothing
    lengths = tuple(cu_seqlens.diff().tolist()) if known else ()
    valid = torch.arange(size, device=mask.device) < ends[-1]
    return Packing(cu_seqlens, index // positions, index, lengths, positions, batch, valid)


def static_size(share: float, batch: int, positions: int) -> int:
    """Tokens of a packing with room for this ``share`` of all positions of a batch, rounded up to a multiple of 128.

    There is room for the two positions that every sample keeps, however small the share.
    """
    tokens = max(2 * batch, math.ceil(share * batch * positions))
    return min(batch * positions, -(-tokens // 128) * 128)


def full_packing(batch: int, positions: int, device: torch.device) -> Packing:
    """The packing that keeps every position of every sample; reads nothing from the device."""
    index = torch.arange(batch * positions, device=device)
    cu_seqlens = torch.arange(0, batch * positions + 1, positions, dtype=torch.int32, device=device)
    return Packing(cu_seqlens, index // positions, index, (positions,) * batch, positions, batch)


def pack(grid: Tensor, packing: Packing) -> Tensor:
    """Gather the kept positions of ``grid`` (B, L, ...) as (T, ...)."""
    return grid.flatten(0, 1).index_select(0, packing.index)
