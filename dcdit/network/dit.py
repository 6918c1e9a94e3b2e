"""The plain DiT with fixed patches, on the same blocks: the baseline of every comparison."""

from typing import ClassVar

from torch import Tensor, nn

from dcdit.checks import Count, Depth, Grid, LabelDropout, MlpRatio, Size, checked
from dcdit.errors import UserError
from dcdit.network.attention import Backend, check_installed
from dcdit.network.blocks import DiTBlock, OutputLayer
from dcdit.network.caching import CachedStep
from dcdit.network.embeddings import Conditioning, FreqShift, TimeInput, position_table
from dcdit.network.gates import gates_of, run_block
from dcdit.network.initialisers import xavier_init
from dcdit.network.interface import Component, Network, Output
from dcdit.network.layers import BlockStyle, MLPName, NormName
from dcdit.network.packing import full_packing
from dcdit.network.rotary import PositionName, Rotary


@checked
class DiT(Network):
    """Diffusion Transformer with fixed patches and adaLN-Zero (DiT, arXiv 2212.09748).

    Args:
        grid: side of the square latent grid.
        channels: latent channels C.
        num_classes: real classes; label ``num_classes`` is the null class.
        patch: patch side; must divide ``grid``.
        width, depth, heads, mlp_ratio, label_dropout, freq_shift, time_input: as in :class:`dcdit.network.DCDiT`.
        variance, norm, mlp, position, qk_norm, gates, attention: as there.

    Raises:
        UserError: if the sizes do not fit each other or a name is unknown.
    """

    float32_parts: ClassVar[tuple[str, ...] | None] = ()
    pos_embed: Tensor | None

    def __init__(
        self,
        grid: Grid,
        channels: Size,
        num_classes: Count,
        width: Size,
        depth: Depth,
        heads: Size,
        patch: Size = 2,
        mlp_ratio: MlpRatio = 4.0,
        label_dropout: LabelDropout = 0.1,
        freq_shift: FreqShift = 0,
        time_input: TimeInput = "steps",
        variance: bool = True,
        norm: NormName = "layer",
        mlp: MLPName = "gelu",
        position: PositionName = "table",
        qk_norm: bool = False,
        gates: bool = False,
        attention: Backend = "auto",
    ) -> None:
        super().__init__(grid, channels, num_classes, label_dropout)
        self.variance = variance
        check_installed(attention)
        if grid % patch:
            raise UserError(f"patch={patch} does not divide grid={grid}: take a patch side that does, such as 2")
        self.patch = patch
        side = grid // patch

        self.condition = Conditioning(width, num_classes, freq_shift, time_input)
        self.embed = xavier_init(nn.Conv2d(channels, width, patch, stride=patch))
        table = position_table(side, side, width) if position == "table" else None
        self.register_buffer("pos_embed", table, persistent=False)
        self.rotary = Rotary(side, width, heads) if position == "rope" else None
        style = BlockStyle(norm, mlp, qk_norm)
        blocks = [DiTBlock(width, heads, mlp_ratio, "paper", attention, style) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.output = OutputLayer(width, width, patch * patch * (1 + variance) * channels, norm)
        self.gates = gates_of(blocks) if gates else None

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        drop_fraction: float | Tensor = 0.0,
        cache: CachedStep | None = None,
        capacity: float | None = None,
    ) -> Output:
        """Predict the noise and the variance of ``x``; see :class:`Network`."""
        self.check_inputs(x, t, y)
        self.refuse_budgets(drop_fraction, cache, capacity)
        c = self.condition(t, y)  # (B, D)
        patches = self.embed(x).flatten(2).transpose(1, 2)  # (B, L / patch^2, D)
        packing = full_packing(len(x), patches.shape[1], x.device)
        # float32 between blocks, also where no table is added
        tokens = (patches.float() if self.pos_embed is None else patches + self.pos_embed).flatten(0, 1)
        rotation = None if self.rotary is None else self.rotary(packing)
        gating = self.gating(t)
        for number, block in enumerate(self.blocks):
            tokens = run_block(block, gating, number, tokens, c, packing, rotation)
        out = self.output(tokens.unflatten(0, (len(x), -1)), c)  # (B, L / patch^2, patch^2 * 2C)
        return Output(self.unpatchify(out), None, gating=gating)

    def unpatchify(self, out: Tensor) -> Tensor:
        """(B, h * w, patch * patch * 2C) to (B, 2C, h * patch, w * patch)."""
        side = self.grid[0] // self.patch
        tiles = out.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (side, side))  # (B, h, w, p, q, 2C)
        return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @property
    def token_grid(self) -> tuple[int, int]:
        """The grid of the patches."""
        return self.grid[0] // self.patch, self.grid[1] // self.patch

    @property
    def title(self) -> str:
        """The name of the network with its patch side, such as ``DiT/2``."""
        return f"DiT/{self.patch}"

    def components(self) -> list[Component]:
        """The parts of a forward pass; all but the conditioning run once for every patch."""
        tokens = self.positions // self.patch**2
        return [
            Component("embedding", [self.embed], tokens),
            Component("conditioning", [self.condition]),
            *([] if self.gates is None else [Component("gates", [self.gates])]),
            Component("backbone", [self.blocks], tokens),
            Component("output", [self.output], tokens),
        ]
