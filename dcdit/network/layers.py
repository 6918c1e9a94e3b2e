"""What the transformer blocks consist of, each a choice by name: their norms and their MLP."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from dcdit.checks import OneOf
from dcdit.network.initialisers import xavier_init


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without affine parameters, epsilon 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension without a learned scale, epsilon 1e-6."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def gated(x: Tensor, gates: Tensor) -> Tensor:
    """``x`` (..., n, d) times ``gates`` (..., n)."""
    return x * gates[..., None].type_as(x)


def gated_channels(hidden: Tensor, groups: Tensor) -> Tensor:
    """The ``hidden`` channels (..., n * d) in n groups, times ``groups`` (..., n)."""
    return gated(hidden.unflatten(-1, (groups.shape[-1], -1)), groups).flatten(-2)


class MLP(nn.Module):
    """Linear, tanh-approximated GELU, Linear.

    Args:
        width: input and output width D.
        ratio: hidden width over D.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        # Both are drawn by PyTorch's default first: the order of random numbers is part of what a seed means.
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        xavier_init(self.fc1)
        xavier_init(self.fc2)

    def forward(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        """Map ``x`` (..., D) to (..., D); ``groups`` (..., n), if given, multiply n groups of hidden channels."""
        hidden = F.gelu(self.fc1(x), approximate="tanh")
        return self.fc2(hidden if groups is None else gated_channels(hidden, groups))


class SwiGLU(nn.Module):
    """Gated MLP: ``fc2(silu(gate) * value)`` (arXiv 2002.05202, equation 6).

    The hidden width is two thirds of that of :class:`MLP`, rounded to a multiple of 8: three matrices instead of two
    then have about as many parameters. ``fc1`` gives the gate, then the value, in one product.

    Args:
        width: input and output width D.
        ratio: hidden width of the MLP that it stands for, over D.
    """

    stacked: ClassVar[dict[str, int]] = {"fc1": 2}  # see dcdit.network.matrices

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = 8 * max(1, round(width * ratio / 12))
        self.fc1, self.fc2 = xavier_init(nn.Linear(width, 2 * hidden)), xavier_init(nn.Linear(hidden, width))

    def forward(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        """Map ``x`` (..., D) to (..., D); ``groups`` (..., n), if given, multiply n groups of hidden channels."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        hidden = F.silu(gate) * value
        return self.fc2(hidden if groups is None else gated_channels(hidden, groups))


NORMS: dict[str, Callable[[Tensor], Tensor]] = {"layer": layer_norm, "rms": rms_norm}
"""What ``model.norm`` may say: from (..., D) to (..., D), without parameters, which the modulation gives."""

MLPS: dict[str, Callable[[int, float], nn.Module]] = {"gelu": MLP, "swiglu": SwiGLU}
"""What ``model.mlp`` may say: from the width D and ``mlp_ratio`` to a module that maps (..., D) to (..., D).

With ``model.gates=true`` it has the Linears ``fc1`` and ``fc2``, and takes gates of the channels between them."""

NormName = Annotated[str, OneOf(NORMS)]
MLPName = Annotated[str, OneOf(MLPS)]


@dataclass(frozen=True)
class BlockStyle:
    """What the transformer blocks of a network consist of; as published if nothing is said.

    Attributes:
        norm: one of :data:`NORMS`.
        mlp: one of :data:`MLPS`.
        qk_norm: normalise the queries and keys of each head.
    """

    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False


PUBLISHED = BlockStyle()
