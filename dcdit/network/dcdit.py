"""DC-DiT: a diffusion transformer over a learned selection of grid positions (arXiv 2603.06351)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcdit.checks import check_label_dropout, check_sizes
from dcdit.errors import UserError
from dcdit.network.attention import check_backend
from dcdit.network.blocks import ConvBlock, DiTBlock, OutputLayer
from dcdit.network.dechunk import dechunk, straight_through
from dcdit.network.embeddings import LabelEmbedding, TimestepEmbedding, position_table
from dcdit.network.init import InitScheme, check_scheme, xavier_init, zero_init
from dcdit.network.packing import Packing, make_packing, pack
from dcdit.network.routing import Routing, build_router, route


@dataclass(frozen=True)
class Output:
    """What a network returns.

    Attributes:
        prediction: (B, 2C, H, W); the first C channels are the noise, the last C the variance value in [-1, 1] of
            learned range variance.
        routing: the router's decision; None for a network without one.
    """

    prediction: Tensor
    routing: Routing | None


class Conditioning(nn.Module):
    """c = time(t) + label(y), a vector of width D per sample."""

    def __init__(self, width: int, num_classes: int, label_dropout: float) -> None:
        super().__init__()
        self.time = TimestepEmbedding(width)
        self.label = LabelEmbedding(num_classes, width, label_dropout)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """(B,) timesteps and (B,) labels to (B, D)."""
        return self.time(t) + self.label(y)


class ConvStack(nn.Module):
    """Two convolution blocks, then RMSNorm over channels: the encoder (E to D) and the decoder (D to E)."""

    def __init__(self, blocks: list[ConvBlock], out_channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(out_channels, eps=1e-5)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map ``x`` (B, in, H, W), conditioned on ``c`` (B, D), to features (B, H, W, out)."""
        for block in self.blocks:
            x = block(x, c)
        # float32 in, as the weight is: mixed types would leave the fused kernel
        return self.norm(x.permute(0, 2, 3, 1).float())


class Backbone(nn.Module):
    """DiT blocks on packed tokens, then RMSNorm."""

    def __init__(self, blocks: list[DiTBlock], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, tokens: Tensor, c: Tensor, packing: Packing) -> Tensor:
        """Map ``tokens`` (T, D), conditioned per sample on ``c`` (B, D), to (T, D)."""
        for block in self.blocks:
            tokens = block(tokens, c, packing)
        return self.norm(tokens)


class DCDiT(nn.Module):
    """Dynamic Chunking Diffusion Transformer.

    Args:
        grid: side of the square latent grid (32 for 256px, 64 for 512px).
        channels: latent channels C.
        num_classes: real classes; label ``num_classes`` is the null class.
        width: backbone width D.
        depth: number of DiT blocks.
        heads: attention heads.
        encoder_width: encoder and decoder width E; None takes D / 4.
        groups: GroupNorm groups of the convolution blocks; must leave two channels or more per group.
        mlp_ratio: hidden width of the MLPs over D.
        router: ``predictability`` or ``cosine`` (ablation).
        smoothing_sigma: width of the de-chunk smoothing in grid positions (1 at 256px, 2 at 512px); None turns
            smoothing off (ablation).
        label_dropout: probability of the null class in training mode.
        init: ``released`` (what the published numbers came from) or ``paper`` (adaLN-Zero, zero residual).
        attention: ``auto``, ``sdpa``, ``varlen`` or ``flash_attn``.

    Raises:
        UserError: if the sizes do not fit each other or a name is unknown.
    """

    pos_embed: Tensor

    def __init__(
        self,
        grid: int = 32,
        channels: int = 4,
        num_classes: int = 1000,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        encoder_width: int | None = None,
        groups: int = 32,
        mlp_ratio: float = 4.0,
        router: str = "predictability",
        smoothing_sigma: float | None = 1.0,
        label_dropout: float = 0.1,
        init: InitScheme = "released",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {"grid": grid, "channels": channels, "num_classes": num_classes}
        check_sizes({**sizes, "width": width, "depth": depth, "heads": heads})
        check_scheme(init)
        check_backend(attention)
        check_label_dropout(label_dropout)
        if width % 4:
            raise UserError(f"width={width} is not divisible by 4, which the 2-D position table needs")
        if smoothing_sigma is not None and smoothing_sigma <= 0:
            raise UserError(f"smoothing_sigma={smoothing_sigma} is not positive: take 1 or 2, or null for no smoothing")
        self.grid = (grid, grid)
        self.channels = channels
        self.num_classes = num_classes
        self.smoothing_sigma = smoothing_sigma
        inner = encoder_width or width // 4

        self.condition = Conditioning(width, num_classes, label_dropout)
        self.embed = xavier_init(nn.Conv2d(channels, inner, 3, padding=1))
        self.encoder = ConvStack(
            [ConvBlock(inner, inner, width, groups), ConvBlock(inner, width, width, groups)], width
        )
        self.residual = {"paper": zero_init, "released": xavier_init}[init](nn.Linear(width, width))
        self.router = build_router(router, width)
        self.register_buffer("pos_embed", position_table(grid, grid, width), persistent=False)
        blocks = [DiTBlock(width, heads, mlp_ratio, init, attention) for _ in range(depth)]
        self.backbone = Backbone(blocks, width)
        self.decoder = ConvStack(
            [ConvBlock(width, inner, width, groups), ConvBlock(inner, inner, width, groups)], inner
        )
        self.output = OutputLayer(inner, width, 2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_fraction: float | Tensor = 0.0) -> Output:
        """Predict the noise and the variance of ``x`` (paper, figure 2).

        Args:
            x: (B, C, H, W) noisy latents.
            t: (B,) timesteps in 0..999.
            y: (B,) class labels in 0..num_classes.
            drop_fraction: share of kept tokens to drop, in [0, 1), one number or one per sample (B,).

        Raises:
            UserError: if the shapes do not fit the network or the drop fraction is outside [0, 1).
        """
        check_inputs(x, t, y, (self.channels, *self.grid))
        c = self.condition(t, y)  # (B, D)
        features = self.encoder(self.embed(x), c)  # (B, H, W, D)
        routing = self.route(features, drop_fraction)
        packing = make_packing(routing.mask)
        positions = self.pos_embed.index_select(0, packing.index % packing.bound)
        kept = pack(features.flatten(1, 2), packing) + positions
        tokens = self.backbone(kept, c, packing)  # (T, D)
        combined = self.combine(tokens, features, routing, packing)  # (B, H, W, D)
        decoded = self.decoder(combined.permute(0, 3, 1, 2), c)  # (B, H, W, E)
        prediction = self.output(decoded.flatten(1, 2), c)  # (B, L, 2C)
        return Output(prediction.transpose(1, 2).unflatten(2, self.grid), routing)

    def route(self, features: Tensor, drop_fraction: float | Tensor) -> Routing:
        """Decide in float32 which positions of ``features`` (B, H, W, D) to keep."""
        with torch.autocast(features.device.type, enabled=False):
            return route(self.router(features.float().permute(0, 3, 1, 2)), drop_fraction)

    def combine(self, tokens: Tensor, features: Tensor, routing: Routing, packing: Packing) -> Tensor:
        """De-chunk ``tokens`` (T, D) and add the encoder's residual, in float32: (B, H, W, D)."""
        with torch.autocast(features.device.type, enabled=False):
            spread = dechunk(tokens, routing, packing, self.grid, self.smoothing_sigma)  # (B, L, D)
            gate = straight_through(routing.confidence)[..., None]
            combined = torch.addcmul(self.residual(features.float()).flatten(1, 2), spread, gate)
            return combined.unflatten(1, self.grid)


def check_inputs(x: Tensor, t: Tensor, y: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise :class:`UserError` unless ``x`` is (B, *shape) and ``t`` and ``y`` are (B,)."""
    batch = x.shape[0]
    if x.shape[1:] != shape or t.shape != (batch,) or y.shape != (batch,):
        raise UserError(
            f"expected x (B, {', '.join(map(str, shape))}), t (B,) and y (B,);"
            f" got x {tuple(x.shape)}, t {tuple(t.shape)} and y {tuple(y.shape)}"
        )
