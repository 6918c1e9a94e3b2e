"""The backbone of DC-DiT, and what it computes from."""

from dataclasses import dataclass

from torch import Tensor, nn

from dcdit.network.blocks import DiTBlock
from dcdit.network.gates import Gating, run_block
from dcdit.network.packing import Packing
from dcdit.network.routing import Routing


@dataclass(frozen=True, eq=False)
class BackboneInputs:
    """What the backbone computes from, of the same B samples.

    Attributes:
        features: (B, H, W, D) of the encoder.
        c: (B, D) conditioning vectors.
        routing: the positions that it runs on.
        gating: the heads and MLP channels that run; None for a network without gates.
    """

    features: Tensor
    c: Tensor
    routing: Routing
    gating: Gating | None

    def of(self, samples: Tensor) -> "BackboneInputs":
        """The same of these ``samples`` (n,) int64 alone."""
        gating = None if self.gating is None else self.gating.of(samples)
        return BackboneInputs(self.features[samples], self.c[samples], self.routing.of(samples), gating)


class Backbone(nn.Module):
    """DiT blocks on packed tokens, then RMSNorm."""

    def __init__(self, blocks: list[DiTBlock], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(
        self,
        tokens: Tensor,
        c: Tensor,
        packing: Packing,
        rotation: Tensor | None = None,
        gating: Gating | None = None,
    ) -> Tensor:
        """Map ``tokens`` (T, D), conditioned per sample on ``c`` (B, D), to (T, D); see :class:`DiTBlock`."""
        for number, block in enumerate(self.blocks):
            tokens = run_block(block, gating, number, tokens, c, packing, rotation)
        return self.norm(tokens)
