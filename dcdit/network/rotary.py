"""Rotary position embedding on packed tokens: queries and keys turn by the row and the column of their position."""

from typing import Literal

import torch
from torch import Tensor, nn

from dcdit.network.attention import head_width
from dcdit.network.embeddings import axis_angles
from dcdit.network.packing import Packing

PositionName = Literal["table", "rope"]
"""How the blocks know where tokens are. ``table``: a fixed sin-cos vector is added to each token, as published.
``rope``: its queries and keys are rotated (:class:`Rotary`)."""


class Rotary(nn.Module):
    """The rotations of kept positions in two dimensions (RoPE, arXiv 2104.09864; on images arXiv 2501.01423).

    A head of d channels has d/2 adjacent pairs. The first half of the pairs turns by the row, the second half by the
    column, pair i of each by the angle ``coordinate * 10000^(-2i / (d/2))``. So a score depends on the offset of two
    positions alone.

    Args:
        side: of the grid.
        width: of tokens, D.
        heads: attention heads.
        patch: count in patches of this side, see :func:`dcdit.network.embeddings.axis_angles`.

    Raises:
        UserError: unless heads have a multiple of 4 channels.
    """

    table: Tensor

    def __init__(self, side: int, width: int, heads: int, patch: int = 1) -> None:
        super().__init__()
        table = rotary_table(side, head_width(width, heads, rotary=True), patch)
        self.register_buffer("table", table, persistent=False)

    def forward(self, packing: Packing) -> Tensor:
        """Cosine and sine for each pair of channels of each token, (T, d/2, 2) float32, which all blocks share."""
        return self.table.index_select(0, packing.positions)


def rotary_table(side: int, channels: int, patch: int = 1) -> Tensor:
    """Cosine and sine for each pair of the ``channels`` d of a head, at each position: (side^2, d/2, 2) float32."""
    if torch.get_default_device().type == "meta":  # whoever builds at no cost does not look at it
        return torch.empty(side * side, channels // 2, 2)
    angles = axis_angles(side, channels // 2, patch)  # (side, d/4)
    axis = torch.stack([angles.cos(), angles.sin()], dim=-1).float()
    table = torch.cat([axis[:, None].expand(-1, side, -1, -1), axis.expand(side, -1, -1, -1)], dim=2)
    return table.flatten(0, 1).to(torch.get_default_device())


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair of adjacent channels of ``x`` (T, heads, d) by ``rotation`` (T, d/2, 2); float32.

    bfloat16 would round cosines to 3 digits, and what should be equal offsets would differ.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (T, heads, d/2, 2)
    if torch.compiler.is_compiling():  # which generates no code for complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), rotation[:, None].unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    # One pass over memory: on a CPU, forward and backward take an eighth of the time of the form above.
    rotated = torch.view_as_complex(pairs) * torch.view_as_complex(rotation)[:, None]
    return torch.view_as_real(rotated).flatten(-2)
