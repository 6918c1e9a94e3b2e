"""The layers that DC-DiT and the plain DiT share."""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dcdit.errors import UserError
from dcdit.network.attention import head_width, packed_attention
from dcdit.network.gates import BlockGates
from dcdit.network.initialisers import InitScheme, xavier_init, zero_init
from dcdit.network.layers import MLPS, NORMS, PUBLISHED, BlockStyle, gated
from dcdit.network.packing import Packing
from dcdit.network.rotary import rotate


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """GroupNorm with affine parameters and epsilon 1e-5.

    Raises:
        UserError: if ``groups`` does not divide ``channels``, or leaves one channel per group: normalising every
            channel alone erases whatever was added to all positions of it, the conditioning above all.
    """
    if channels % groups or channels == groups:
        fitting = [g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g > 1]
        raise UserError(
            f"groups={groups} does not suit {channels} channels: each group needs the same number of channels, at least"
            f" two; take {' or '.join(map(str, fitting[:2]))}"
        )
    return nn.GroupNorm(groups, channels, eps=1e-5)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer-norm modulation ``x * (1 + scale) + shift``."""
    return x * (1 + scale) + shift


class ConvBlock(nn.Module):
    """Residual convolution block of the encoder and decoder, conditioned between its convolutions.

    Args:
        in_channels, out_channels: channels; the inner width is the smaller of the two.
        condition: width D of the conditioning vector.
        groups: groups of both GroupNorms.
    """

    def __init__(self, in_channels: int, out_channels: int, condition: int, groups: int) -> None:
        super().__init__()
        inner = min(in_channels, out_channels)
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, inner, 3, padding=1)
        self.condition = xavier_init(nn.Linear(condition, inner))
        self.norm2 = group_norm(groups, inner)
        self.conv2 = nn.Conv2d(inner, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map ``x`` (B, in, H, W), conditioned on ``c`` (B, D), to (B, out, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.condition(F.silu(c))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Multi-head self-attention within each sample of a packed sequence.

    Args:
        width: of tokens, D.
        heads: attention heads.
        backend: attention backend.
        qk_norm: an RMSNorm on the queries and on the keys of each head (arXiv 2302.05442).

    Raises:
        UserError: if ``heads`` does not divide ``width``.
    """

    stacked: ClassVar[dict[str, int]] = {"qkv": 3}  # see dcdit.network.matrices

    def __init__(self, width: int, heads: int, backend: str, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.channels = heads, head_width(width, heads)
        self.backend = backend
        self.qkv = xavier_init(nn.Linear(width, 3 * width))
        self.out = xavier_init(nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.RMSNorm(self.channels, eps=1e-5) for _ in range(2 * qk_norm))

    def project(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (T, heads, d) each, of ``x`` (T, D).

        Args:
            x: modulated tokens.
            rotation: (T, d/2, 2) of :class:`dcdit.network.rotary.Rotary`, which turns queries and keys after their
                norm; None turns nothing.
        """
        q, k, v = self.qkv(x).unflatten(1, (3, -1, self.channels)).unbind(1)  # of the heads that run
        if self.norms:  # in float32, as the norms' weights are
            q, k = (norm(vectors.float()) for norm, vectors in zip(self.norms, (q, k), strict=True))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q.type_as(v), k.type_as(v), v


class DiTBlock(nn.Module):
    """Transformer block with adaptive layer norm (DiT, figure 3) on packed tokens.

    Args:
        width: token width D.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        init: ``paper`` starts the modulation at zero (adaLN-Zero), ``released`` at Xavier uniform.
        attention: attention backend.
        style: its norms and its MLP.

    Attributes:
        compiled: run what lies before and after the attention through torch.compile, once for all blocks.
        checkpointed: keep nothing for the backward pass but the input (activation checkpointing).
    """

    stacked: ClassVar[dict[str, int]] = {"modulation": 6}  # see dcdit.network.matrices

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        init: InitScheme,
        attention: str,
        style: BlockStyle = PUBLISHED,
    ) -> None:
        super().__init__()
        self.compiled, self.checkpointed = False, False
        self.norm = NORMS[style.norm]
        self.attention = Attention(width, heads, attention, style.qk_norm)
        self.mlp = MLPS[style.mlp](width, mlp_ratio)
        self.modulation = {"paper": zero_init, "released": xavier_init}[init](nn.Linear(width, 6 * width))

    def forward(
        self,
        tokens: Tensor,
        c: Tensor,
        packing: Packing,
        rotation: Tensor | None = None,
        gates: BlockGates | None = None,
    ) -> Tensor:
        """Map ``tokens`` (T, D), conditioned per sample on ``c`` (B, D), to (T, D).

        Args:
            tokens, c, packing: as above.
            rotation: (T, d/2, 2), turns queries and keys, see :class:`dcdit.network.rotary.Rotary`.
            gates: multiply the results of heads and the hidden channels of the MLP.
        """
        arguments = (tokens, c, packing, rotation, gates)
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self._forward, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self._forward(*arguments)

    def modulated(self, grid: Tensor, c: Tensor) -> Tensor:
        """What the attention would be given of ``grid`` (B, L, D), conditioned on ``c`` (B, D): (B, L, D)."""
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)[:2]
        return modulate(self.norm(grid), shift, scale)

    def _forward(
        self, tokens: Tensor, c: Tensor, packing: Packing, rotation: Tensor | None, gates: BlockGates | None
    ) -> Tensor:
        before, after = type(self)._before, type(self)._after
        if self.compiled:
            for tensor in (tokens, packing.sample, *([] if rotation is None else [rotation])):
                torch._dynamo.mark_dynamic(tensor, 0)
            before, after = fused(before), fused(after)
        per_sample = self.modulation(F.silu(c))  # (B, 6 D): the Linear runs once per sample
        q, k, v = before(self, tokens, per_sample, packing.sample, rotation)
        attended = packed_attention(q, k, v, packing, self.attention.backend)  # (T, heads, d)
        if gates is not None:
            attended = gated(attended, gates.heads.index_select(0, packing.sample))
        attended = attended.flatten(1)
        if self.compiled:
            torch._dynamo.mark_dynamic(attended, 0)
        groups = () if gates is None else (gates.groups.index_select(0, packing.sample),)
        return after(self, tokens, attended, per_sample, packing.sample, *groups)

    def _before(
        self, tokens: Tensor, per_sample: Tensor, sample: Tensor, rotation: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Modulated norm, then queries, keys and values: (T, heads, d) each."""
        width = tokens.shape[1]
        shift, scale = per_sample[:, : 2 * width].chunk(2, dim=1)
        shift, scale = to_tokens(sample, shift, 1 + scale)
        return self.attention.project(self.norm(tokens) * scale + shift, rotation)

    def _after(
        self, tokens: Tensor, attended: Tensor, per_sample: Tensor, sample: Tensor, groups: Tensor | None = None
    ) -> Tensor:
        """What follows the attention: its projection, its gate, and the MLP, times its gates ``groups`` (T, groups)."""
        width = tokens.shape[1]
        gate1, shift, scale, gate2 = per_sample[:, 2 * width :].chunk(4, dim=1)
        gate1, shift, scale, gate2 = to_tokens(sample, gate1, shift, 1 + scale, gate2)
        tokens = tokens + gate1 * self.attention.out(attended)
        modulated = self.norm(tokens) * scale + shift
        return tokens + gate2 * (self.mlp(modulated) if groups is None else self.mlp(modulated, groups))


def blocks_of(module: nn.Module) -> list[DiTBlock]:
    """The transformer blocks inside a module, such as a network, in the order of its forward pass."""
    return [block for block in module.modules() if isinstance(block, DiTBlock)]


@cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled, its element-wise operations in as few passes over memory as possible."""
    return torch.compile(function)


def to_tokens(sample: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Give each of these ``vectors`` of the samples (B, D) to the tokens of its sample: (T, D) each, by one gather.

    Args:
        sample: (T,) int64, the sample that owns each token.
    """
    return torch.cat(vectors, dim=1).index_select(0, sample).chunk(len(vectors), dim=1)


class OutputLayer(nn.Module):
    """Modulated norm and Linear, both starting at zero, so that a fresh network predicts zero.

    Args:
        width: input width.
        condition: width D of the conditioning vector.
        out_features: features per position.
        norm: one of :data:`dcdit.network.layers.NORMS`.
    """

    def __init__(self, width: int, condition: int, out_features: int, norm: str) -> None:
        super().__init__()
        self.norm = NORMS[norm]
        self.modulation = zero_init(nn.Linear(condition, 2 * width))
        self.linear = zero_init(nn.Linear(width, out_features))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map ``x`` (B, L, width), conditioned on ``c`` (B, D), to (B, L, out_features)."""
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))
