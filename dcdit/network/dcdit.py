"""DC-DiT: a diffusion transformer over a learned selection of grid positions (arXiv 2603.06351)."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from dcdit.checks import Bounds, Count, Depth, Grid, LabelDropout, MlpRatio, Size, checked
from dcdit.network.attention import Backend, check_installed
from dcdit.network.backbone import Backbone, BackboneInputs
from dcdit.network.blocks import ConvBlock, DiTBlock, OutputLayer
from dcdit.network.caching import CachedStep
from dcdit.network.dechunk import dechunk, straight_through
from dcdit.network.embeddings import Conditioning, FreqShift, TimeInput, position_table
from dcdit.network.gates import gates_of
from dcdit.network.initialisers import InitScheme, xavier_init, zero_init
from dcdit.network.interface import Component, Network, Output
from dcdit.network.layers import BlockStyle, MLPName, NormName
from dcdit.network.packing import Packing, make_packing, make_static_packing, pack, static_size
from dcdit.network.rotary import PositionName, Rotary
from dcdit.network.routing import ROUTERS, RouterName, Routing, check_probabilities, exact_float32, route

SmoothingSigma = Annotated[float, Bounds(0, 512, open_low=True, hint="take 1 or 2, or null for no smoothing")]


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


@checked
class DCDiT(Network):
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
        router: one of :data:`dcdit.network.routing.ROUTERS`: ``predictability``, or ``cosine`` (ablation).
        smoothing_sigma: width of the de-chunk smoothing in grid positions (1 at 256px, 2 at 512px); None turns
            smoothing off (ablation).
        label_dropout: probability of the null class in a training step.
        init: ``released`` (what the published numbers came from) or ``paper`` (adaLN-Zero, zero residual projection).
        position_patch: side of the patches in which the backbone's positions count: that of the plain DiT from which
            its blocks were taken over; 1 where they were trained from scratch.
        condition_norm: a LayerNorm on the conditioning vector of the encoder and the decoder: adapts it to them where
            blocks and conditioning were taken over (paper, section 4.4).
        freq_shift: frequencies of the timestep embedding, see :data:`dcdit.network.embeddings.FreqShift`.
        time_input: what of a timestep is embedded, see :data:`dcdit.network.embeddings.TimeInput`.
        variance: predict a variance beside, which DDPM needs and flow matching leaves alone.
        norm: of the blocks and of the output: ``layer`` as published, or ``rms``.
        mlp: of the blocks: ``gelu`` as published, or ``swiglu``.
        position: how the blocks know positions: ``table`` as published, or ``rope``.
        qk_norm: normalise queries and keys of each head (arXiv 2302.05442); not as published.
        gates: let the timestep decide which heads and groups of MLP channels run, see :mod:`dcdit.network.gates`.
        attention: ``auto``, ``sdpa``, ``varlen`` or ``flash_attn``.

    Attributes:
        router_tf32: let the router's convolutions run in TF32 on a GPU, if ``torch.backends.cudnn.allow_tf32`` says so,
            as it does by default. False: they run in float32, as published, so that a GPU decides as precisely as a
            CPU. The backward pass follows torch's setting either way.

    Raises:
        UserError: if the sizes do not fit each other or a name is unknown.
    """

    routes: ClassVar[bool] = True
    caches: ClassVar[bool] = True
    drops_path: ClassVar[bool] = True
    float32_parts: ClassVar[tuple[str, ...] | None] = ("router", "residual")
    title = "DC-DiT"
    pos_embed: Tensor | None
    router_tf32: bool = False

    def __init__(
        self,
        grid: Grid,
        channels: Size,
        num_classes: Count,
        width: Size,
        depth: Depth,
        heads: Size,
        encoder_width: Size | None = None,
        groups: Size = 32,
        mlp_ratio: MlpRatio = 4.0,
        router: RouterName = "predictability",
        smoothing_sigma: SmoothingSigma | None = 1.0,
        label_dropout: LabelDropout = 0.1,
        init: InitScheme = "released",
        position_patch: Size = 1,
        condition_norm: bool = False,
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
        table = position_table(grid, grid, width, position_patch) if position == "table" else None
        self.register_buffer("pos_embed", table, persistent=False)
        self.rotary = Rotary(grid, width, heads, position_patch) if position == "rope" else None
        self.smoothing_sigma = smoothing_sigma
        inner = encoder_width or width // 4

        self.condition = Conditioning(width, num_classes, freq_shift, time_input)
        self.embed = xavier_init(nn.Conv2d(channels, inner, 3, padding=1))
        self.encoder = ConvStack(
            [ConvBlock(inner, inner, width, groups), ConvBlock(inner, width, width, groups)], width
        )
        self.residual = {"paper": zero_init, "released": xavier_init}[init](nn.Linear(width, width))
        self.router = ROUTERS[router](width)
        style = BlockStyle(norm, mlp, qk_norm)
        blocks = [DiTBlock(width, heads, mlp_ratio, init, attention, style) for _ in range(depth)]
        self.backbone = Backbone(blocks, width)
        self.decoder = ConvStack(
            [ConvBlock(width, inner, width, groups), ConvBlock(inner, inner, width, groups)], inner
        )
        self.output = OutputLayer(inner, width, (1 + variance) * channels, norm)
        self.condition_norm = nn.LayerNorm(width) if condition_norm else nn.Identity()
        self.gates = gates_of(blocks) if gates else None  # last: the random numbers before are those without gates

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        drop_fraction: float | Tensor = 0.0,
        cache: CachedStep | None = None,
        capacity: float | None = None,
    ) -> Output:
        """Predict the noise and the variance of ``x``, as in figure 2 of the paper; see :class:`Network`."""
        self.check_inputs(x, t, y)
        c = self.condition(t, y)  # (B, D)
        adapted = self.condition_norm(c)
        features = self.encoder(self.embed(x), adapted)  # (B, H, W, D)
        routing, change = self.reuse(features, c, self.route(features, drop_fraction), cache)
        inputs = BackboneInputs(features, c, routing, self.gating(t))
        spread, routing = self.run_backbone(inputs, capacity, cache)  # (B, L, D)
        combined = self.combine(spread, features, routing)  # (B, H, W, D)
        decoded = self.decoder(combined.permute(0, 3, 1, 2), adapted)  # (B, H, W, E)
        prediction = self.output(decoded.flatten(1, 2), c)  # (B, L, 2C)
        return Output(prediction.transpose(1, 2).unflatten(2, self.grid), routing, change, inputs.gating)

    def route(self, features: Tensor, drop_fraction: float | Tensor) -> Routing:
        """Decide in float32 which positions of ``features`` (B, H, W, D) to keep."""
        with torch.autocast(features.device.type, enabled=False):
            with nullcontext() if self.router_tf32 else exact_float32(features.device):
                prob = self.router(features.float().permute(0, 3, 1, 2))
            check_probabilities(prob, features.detach(), type(self.router).__name__)
            return route(prob, drop_fraction)

    def reuse(
        self, features: Tensor, c: Tensor, routing: Routing, cache: CachedStep | None
    ) -> tuple[Routing, Tensor | None]:
        """Let samples that reuse what ``cache`` holds keep no position; returns the changes of all too, (B,)."""
        if cache is None:
            return routing, None
        first: DiTBlock = self.backbone.blocks[0]  # type: ignore[assignment]
        without = ~routing.mask.any(dim=1) if routing.may_be_empty else None
        reused, change = cache.reuse(first.modulated(features.flatten(1, 2), c), without)
        return routing.without(reused), change

    def run_backbone(
        self, inputs: BackboneInputs, capacity: float | None, cache: CachedStep | None
    ) -> tuple[Tensor, Routing]:
        """Run the backbone on the kept positions.

        Returns:
            What it gives, on all positions, (B, L, D), of samples that keep none what ``cache`` holds, else 0; and the
            decision with what ``capacity`` dropped.
        """
        if capacity is None:
            packing = make_packing(inputs.routing.mask)
        else:
            size = static_size(capacity, *inputs.routing.mask.shape)
            inputs = replace(inputs, routing=inputs.routing.within(size))
            packing = make_static_packing(inputs.routing.mask, size)
        idle = 0.0 if cache is None else cache.before()
        if not inputs.routing.may_be_empty or (packing.valid is None and all(packing.lengths)):
            spread = self.spread(inputs, packing)
        elif packing.valid is None and not self.training:
            spread = self.spread_some(inputs, packing, idle)
        else:  # losses on hidden states expect the packing of the whole batch, and who reads no lengths has no other
            spread = self.spread_whole(inputs, packing, idle)
        if cache is not None:
            cache.keep(spread)
        return spread, inputs.routing

    def spread(self, inputs: BackboneInputs, packing: Packing) -> Tensor:
        """What the backbone makes of the kept positions, spread over all, (B, L, D)."""
        kept = pack(inputs.features.flatten(1, 2), packing)
        if self.pos_embed is not None:
            kept = kept + self.pos_embed.index_select(0, packing.positions)
        rotation = None if self.rotary is None else self.rotary(packing)
        tokens = self.backbone(kept, inputs.c, packing, rotation, inputs.gating)  # (T, D)
        with torch.autocast(kept.device.type, enabled=False):
            return dechunk(tokens, inputs.routing, packing, self.grid, self.smoothing_sigma)

    def spread_some(self, inputs: BackboneInputs, packing: Packing, idle: Tensor | float) -> Tensor:
        """The same, computed for the samples that keep positions alone; the others get their row of ``idle``."""
        rows = [row for row, length in enumerate(packing.lengths) if length]
        samples = torch.tensor(rows, dtype=torch.int64, device=inputs.c.device)
        computed = inputs.features.new_empty(0, *inputs.features.shape[1:]).flatten(1, 2).float()
        if rows:
            some = inputs.of(samples)
            computed = self.spread(some, make_packing(some.routing.mask, [packing.lengths[row] for row in rows]))
        if isinstance(idle, float):
            idle = computed.new_full((len(inputs.c), *computed.shape[1:]), idle)
        return idle.index_copy(0, samples, computed)

    def spread_whole(self, inputs: BackboneInputs, packing: Packing, idle: Tensor | float) -> Tensor:
        """The same, computed for all samples in one packing, and replaced by ``idle`` for those that keep nothing."""
        empty = ~inputs.routing.mask.any(dim=1)[:, None, None]
        if packing.valid is None and not any(packing.lengths):  # all processes of a training need all gradients
            first = torch.zeros(1, dtype=torch.int64, device=empty.device)
            mask = inputs.routing.mask.index_fill(1, first, True)
            inputs, packing = replace(inputs, routing=replace(inputs.routing, mask=mask)), make_packing(mask)
        return torch.where(empty, idle, self.spread(inputs, packing))

    def combine(self, spread: Tensor, features: Tensor, routing: Routing) -> Tensor:
        """Add ``spread`` (B, L, D) to the encoder's residual, in float32: (B, H, W, D)."""
        with torch.autocast(features.device.type, enabled=False):
            gate = straight_through(routing.confidence)[..., None]
            combined = torch.addcmul(self.residual(features.float()).flatten(1, 2), spread, gate)
            return combined.unflatten(1, self.grid)

    def components(self) -> list[Component]:
        """See :class:`Network`. De-chunking counts as the published dense form, 2 D M^2, though it costs less here."""
        pairs = float(self.residual.in_features) if self.smoothing_sigma is not None else 0.0
        return [
            Component("embedding", [self.embed], self.positions),
            Component("conditioning", [self.condition]),
            Component("encoder", [self.encoder], self.positions),
            Component("residual projection", [self.residual], self.positions, counted_by_paper=False),
            Component("router", [self.router], self.positions),
            *([] if self.gates is None else [Component("gates", [self.gates])]),
            Component("backbone", [self.backbone], None, skipped=True),
            Component("de-chunk", runs=None, pairs=pairs, skipped=True),
            Component("decoder", [self.decoder], self.positions),
            Component("output", [self.output], self.positions),
        ]
