"""What everything else asks of a network: training, sampling, FLOPs, calibration, evaluation and the report."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dcdit.errors import UserError
from dcdit.network.caching import CachedStep
from dcdit.network.gates import Gates, Gating
from dcdit.network.pretrained import Pretrained
from dcdit.network.routing import Routing


@dataclass(frozen=True)
class Output:
    """What a network returns.

    Attributes:
        prediction: (B, 2C, H, W); the first C channels are the noise, or what else the process has it predict, the last
            C the variance value in [-1, 1] of learned range variance. (B, C, H, W) of a network without variance.
        routing: the router's decision; None for a network without one.
        change: with a cache, the relative change of each sample's features since the step before, (B,).
        gating: which heads and groups of MLP channels ran; None for a network without gates.
    """

    prediction: Tensor
    routing: Routing | None
    change: Tensor | None = None
    gating: Gating | None = None


@dataclass(frozen=True)
class Component:
    """A part of a forward pass, for whoever counts FLOPs from outside.

    Attributes:
        name: for people.
        modules: their Linears and convolutions run ``runs`` times in the forward pass of one sample.
        runs: so often; None for once for every token that is kept.
        pairs: multiply-adds for every pair of these, beside those of attention.
        counted_by_paper: whether the published figures hold it.
        skipped: whether it is left out for a sample that keeps no token.
    """

    name: str
    modules: Sequence[nn.Module] = ()
    runs: int | None = 1
    pairs: float = 0.0
    counted_by_paper: bool = True
    skipped: bool = False


class Network(
    Pretrained,
    nn.Module,
    ABC,
    library_name="dcdit",
    paper_url="https://arxiv.org/abs/2603.06351",
    tags=["diffusion", "dc-dit"],
):
    """A denoiser: noisy latents, timesteps and labels to noise and variance.

    Everything that is registered in :data:`dcdit.network.NETWORKS` is one, and nothing outside this package asks which.
    A constructor takes at least ``grid``, ``channels`` and ``num_classes``, which must fit the latents.

    Args:
        grid: side of the square latent grid.
        channels: latent channels C.
        num_classes: real classes; label ``num_classes`` is the null class.
        label_dropout: probability of the null class in :meth:`drop_labels`; guidance needs it above 0.

    Attributes:
        routes: whether a router chooses tokens, so that a drop fraction means something and cost varies.
        caches: whether samples can reuse what the backbone gave before.
        drops_path: whether samples can leave the backbone out, at a drop fraction of 1 (path drop, arXiv 2510.21986).
        float32_parts: names of the modules that compute in float32 under autocast too; None where nobody says it.
        grid: (H, W).
        channels, num_classes, label_dropout: as given.
        variance: whether C channels of variance stand beside the C that are predicted of the latents.
        gates: of the widths of its transformer blocks; None where all of them run.
    """

    routes: ClassVar[bool] = False
    caches: ClassVar[bool] = False
    drops_path: ClassVar[bool] = False
    float32_parts: ClassVar[tuple[str, ...] | None] = None
    variance: bool = True
    gates: Gates | None

    def __init__(self, grid: int, channels: int, num_classes: int, label_dropout: float) -> None:
        super().__init__()
        self.grid = (grid, grid)
        self.channels = channels
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.gates = None

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        drop_fraction: float | Tensor = 0.0,
        cache: CachedStep | None = None,
        capacity: float | None = None,
    ) -> Output:
        """Predict the noise and the variance of ``x``.

        Args:
            x: (B, C, H, W) noisy latents.
            t: (B,) timesteps, whole or not, from 0, the image, to 999 or 1000, pure noise.
            y: (B,) class labels in 0..num_classes.
            drop_fraction: share of kept tokens to drop, in [0, 1], one number or one per sample (B,); 0 for a network
                that does not route. At 1 a sample leaves the backbone out, of a network that :attr:`drops_path`.
            cache: what the samples may reuse, for a network that :attr:`caches`; None computes all of them.
            capacity: share of all positions of the batch that the packed sequence has room for, for a network that
                routes. The sequence always has that length, see :func:`dcdit.network.packing.static_size`, so that
                shapes are static and nothing is read from a GPU; of more tokens the least certain ones are dropped,
                see :attr:`Routing.beyond`. None packs exactly.

        Raises:
            UserError: if the shapes do not fit the network or the drop fraction cannot be had.
        """

    def gating(self, t: Tensor) -> Gating | None:
        """Which heads and groups of MLP channels run at timesteps ``t`` (B,); None for a network without gates."""
        return None if self.gates is None else self.gates(t, self._time_embedding)

    def gating_over_time(self) -> Gating | None:
        """The same at 101 timesteps from 0 to the largest; None too where the weights are not known (meta device)."""
        if self.gates is None or self.gates.router.weight.is_meta:
            return None
        return self.gates.over_time(self._time_embedding)

    @property
    def _time_embedding(self) -> nn.Module:
        condition: Any = getattr(self, "condition", None)
        embedding: nn.Module = condition.time
        return embedding

    def drop_labels(self, y: Tensor) -> Tensor:
        """Labels (B,) for a training step: each is replaced by the null class with probability ``label_dropout``."""
        if not self.label_dropout:
            return y
        dropped = torch.rand(y.shape, device=y.device) < self.label_dropout
        return y.masked_fill(dropped, self.null_class)

    def refuse_budgets(
        self, drop_fraction: float | Tensor, cache: CachedStep | None = None, capacity: float | None = None
    ) -> None:
        """For networks that always compute all tokens: :class:`UserError` if they are asked for less.

        Args:
            drop_fraction, cache, capacity: as given to :meth:`forward`.
        """
        if isinstance(drop_fraction, Tensor) or drop_fraction != 0:
            raise UserError(f"drop_fraction={drop_fraction}: {self.title} drops no tokens, take 0, or a dcdit model")
        if cache is not None:
            raise UserError(f"sampler.cache: {self.title} computes every step, take 0, or a dcdit model")
        if capacity is not None:
            raise UserError(f"capacity={capacity:g}: {self.title} drops no tokens, take null, or a dcdit model")

    def check_capacity(self, key: str, capacity: float | str | None) -> None:
        """Raise :class:`UserError` if this network cannot have the ``capacity`` that ``key`` asks for.

        ``auto`` asks nothing of a network that drops no tokens.
        """
        if capacity is None or (capacity == "auto" and not self.routes):
            return
        given = f"{key}={capacity}" if isinstance(capacity, str) else f"{key}={capacity:g}"
        if not self.routes:
            raise UserError(f"{given}: {self.title} drops no tokens, set {key}=null")
        if "capacity" not in inspect.signature(self.forward).parameters:
            raise UserError(
                f"{given}: {type(self).__name__}.forward takes no capacity: add the argument, see"
                f" dcdit.network.interface.Network.forward, or set {key}=null"
            )

    def check_compiled(self, key: str, choice: str | bool) -> None:
        """Raise :class:`UserError` if this network's blocks cannot be compiled though ``key`` asks for it."""
        if choice is True and self.gates is not None:
            raise UserError(f"{key}=true: width gates change the shapes of the blocks, take {key}=auto, or false")

    @property
    @abstractmethod
    def title(self) -> str:
        """The kind of network as tables and plots call it, such as ``DiT/2``."""

    @abstractmethod
    def components(self) -> list[Component]:
        """The parts of a forward pass, in its order."""

    def parts(self) -> dict[str, nn.Module]:
        """What may be frozen, or learn at a rate of its own, by name; together all parameters, in their order."""
        return {name: part for name, part in self.named_children() if next(part.parameters(), None) is not None}

    @property
    def positions(self) -> int:
        """Grid positions L = H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def token_grid(self) -> tuple[int, int]:
        """The grid (h, w) of which tokens are positions: that of the latents, unless the network has patches."""
        return self.grid

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.num_classes

    def check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Raise :class:`UserError` unless ``x`` is (B, C, H, W), ``t`` and ``y`` are (B,), and labels are classes.

        Labels on a GPU are not read.
        """
        batch, shape = x.shape[0], (self.channels, *self.grid)
        if x.shape[1:] != shape or t.shape != (batch,) or y.shape != (batch,):
            raise UserError(
                f"expected x (B, {', '.join(map(str, shape))}), t (B,) and y (B,);"
                f" got x {tuple(x.shape)}, t {tuple(t.shape)} and y {tuple(y.shape)}"
            )
        if y.device.type == "cpu" and batch and not torch.compiler.is_compiling():
            least, most = (int(bound) for bound in y.aminmax())
            if least < 0 or most > self.num_classes:
                wrong = least if least < 0 else most
                raise UserError(
                    f"label {wrong} is no class: labels are 0 to {self.num_classes}, the last is the null class"
                )
