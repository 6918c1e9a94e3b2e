"""Which grid positions become backbone tokens: the routers and the tail drop."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit.checks import DropFraction, OneOf, Table, conform
from dcdit.errors import UserError
from dcdit.network.initialisers import constant_init


@dataclass(frozen=True)
class Routing:
    """The router's decision for a batch of B grids of L positions in raster order.

    Attributes:
        prob: (B, L) float32, probability that a position is a boundary; the first and the last are 1.
        natural_mask: (B, L) bool, ``prob > 0.5``: what the router keeps by itself.
        mask: (B, L) bool, what is kept after the tail drop; a subset of ``natural_mask``. Nothing of a sample that
            leaves the backbone out, or that reuses what it gave before, see :mod:`dcdit.network.caching`.
        beyond: (B,) tokens of each sample that :meth:`within` dropped; None where there is no capacity.
        may_be_empty: whether a sample may keep nothing; False where that is known without a look at ``mask``.
    """

    prob: Tensor
    natural_mask: Tensor
    mask: Tensor
    beyond: Tensor | None = None
    may_be_empty: bool = False

    @property
    def confidence(self) -> Tensor:
        """(B, L) probability of the natural decision: p where kept, 1 - p elsewhere; never below 0.5."""
        return torch.where(self.natural_mask, self.prob, 1 - self.prob)

    def without(self, samples: Tensor) -> "Routing":
        """The same, but the ``samples`` (B,) bool keep nothing."""
        return replace(self, mask=self.mask & ~samples[:, None], may_be_empty=True)

    def within(self, capacity: int) -> "Routing":
        """The same without the least certain tokens of the batch beyond ``capacity``, at least 2 B.

        The first and the last position of a sample stay; ties keep the lower index. Up to ``capacity`` tokens nothing
        changes.
        """
        certainty = self.prob.detach().masked_fill(~self.mask, -1.0)
        certainty = certainty.masked_fill(self.mask & _ends_of(self.mask), 2.0).flatten()
        first = certainty.sort(descending=True, stable=True).indices[:capacity]
        mask = self.mask & torch.zeros_like(self.mask).flatten().index_fill(0, first, True).view_as(self.mask)
        return replace(self, mask=mask, beyond=(self.mask & ~mask).sum(dim=1))

    def of(self, samples: Tensor | slice) -> "Routing":
        """The decision for these ``samples``, (n,) int64 or a slice, alone."""
        beyond = None if self.beyond is None else self.beyond[samples]
        return Routing(self.prob[samples], self.natural_mask[samples], self.mask[samples], beyond, self.may_be_empty)


def check_probabilities(prob: object, features: Tensor, router: str) -> None:
    """Raise :class:`UserError` unless a router returned float32 probabilities (B, L) of ``features`` (B, H, W, D).

    On a GPU their values are not looked at, which would take a read. NaN that comes from features which are not finite
    is no fault of the router, and is left to whoever skips such steps.
    """
    shape = (len(features), features.shape[1] * features.shape[2])
    if not isinstance(prob, Tensor):
        raise UserError(f"the router {router} returned a {type(prob).__name__}, not a tensor of probabilities (B, L)")
    if prob.shape != shape or prob.dtype != torch.float32:
        raise UserError(
            f"the router {router} returned {prob.dtype} of shape {list(prob.shape)}, not float32 probabilities (B, L) ="
            f" {list(shape)}"
        )
    if prob.device.type == "cpu" and not torch.compiler.is_compiling() and prob.numel():
        least, most = prob.detach().aminmax()
        if least.isnan() and features.isfinite().all():
            raise UserError(
                f"the router {router} returned NaN for finite features: does it divide by zero, or take the root or"
                " logarithm of what may be negative?"
            )
        if least < 0 or most > 1:
            raise UserError(
                f"the router {router} returned values from {least:.3g} to {most:.3g}, which are no probabilities: does"
                " it lack a sigmoid?"
            )


def route(prob: Tensor, drop_fraction: float | Tensor = 0.0) -> Routing:
    """Turn raw router probabilities into a decision.

    Args:
        prob: (B, L) float32.
        drop_fraction: see :func:`tail_drop`.
    """
    prob = prob.masked_fill(_ends_of(prob), 1.0)
    natural_mask = prob > 0.5
    mask = tail_drop(prob.detach(), natural_mask, drop_fraction)
    return Routing(prob, natural_mask, mask, may_be_empty=isinstance(drop_fraction, Tensor) or drop_fraction == 1)


def _ends_of(grid: Tensor) -> Tensor:
    """(B, L) bool, the first and the last position of each sample of ``grid`` (B, L)."""
    ends = torch.zeros_like(grid, dtype=torch.bool)
    ends[:, 0] = ends[:, -1] = True  # of slices: setting a single element of a GPU's tensor makes the host wait
    return ends


def tail_drop(prob: Tensor, natural_mask: Tensor, drop_fraction: float | Tensor) -> Tensor:
    """Drop the least certain share of each sample's kept tokens (paper, tail drop).

    Of the n kept tokens of a sample the floor(rho * n) of lowest probability go, the product taken in float32; at
    least one stays, ties keep the lower raster index. A fraction of 1 is apart (path drop, arXiv 2510.21986): no token
    stays. Masks nest: a larger fraction keeps a subset of a smaller one.

    Args:
        prob: (B, L) boundary probabilities.
        natural_mask: (B, L) bool, at least one position per sample.
        drop_fraction: rho in [0, 1], one number or a (B,) tensor.

    Returns:
        (B, L) bool.

    Raises:
        UserError: if a fraction given as a number lies outside [0, 1].
    """
    if not isinstance(drop_fraction, Tensor):
        number = float(conform("drop_fraction", drop_fraction, DropFraction))
        if number == 0:
            return natural_mask
        if number == 1:
            return torch.zeros_like(natural_mask)
        drop_fraction = torch.full((len(prob),), number, dtype=torch.float32, device=prob.device)
    kept = natural_mask.sum(dim=1)
    dropped = (kept.float() * drop_fraction.float()).floor().long()
    remaining = (kept - dropped).clamp(min=1) * (drop_fraction < 1)
    order = prob.masked_fill(~natural_mask, -1.0).sort(dim=1, descending=True, stable=True).indices
    top = torch.arange(prob.shape[1], device=prob.device) < remaining[:, None]
    return torch.zeros_like(natural_mask).scatter(1, order, top)


def exact_float32(device: torch.device) -> AbstractContextManager[None]:
    """A context in which float32 convolutions on a GPU are not rounded to TF32, as torch lets them be by default.

    Compiled code has no such context; there the process's ``torch.backends.cudnn.allow_tf32`` holds.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return nullcontext()
    return _without_tf32()


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class PredictabilityRouter(nn.Module):
    """Spatial-predictability router: a position is a boundary where its neighbourhood does not predict it.

    Args:
        channels: feature channels D, a multiple of 32.

    Raises:
        UserError: if they are not.
    """

    GROUPS = 8
    BIAS = -1.1  # of the last layer: starts with almost nothing kept

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 4
        if channels % (4 * self.GROUPS):
            raise UserError(
                f"width={channels} is not a multiple of {4 * self.GROUPS}, which the router's {self.GROUPS} groups of"
                " width / 4 channels need"
            )
        self.project = nn.Conv2d(channels, inner, 1)
        self.predict = nn.Conv2d(inner, inner, 3, padding=1)
        self.scorer = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.GroupNorm(self.GROUPS, inner),
            nn.SiLU(),
            constant_init(nn.Conv2d(inner, 1, 1), self.BIAS),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Boundary probabilities (B, L) of ``features`` (B, D, H, W), float32."""
        latent = self.project(features)
        return self.scorer(latent - self.predict(latent)).flatten(1).sigmoid()


class CosineRouter(nn.Module):
    """H-Net's cosine router on a grid (the paper's ablation).

    The probability of position i is the mean of (1 - cos(q_i, k_j)) / 2 over its existing neighbours j above, below,
    left and right. Both projections start as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Boundary probabilities (B, L) of ``features`` (B, D, H, W), float32."""
        tokens = features.permute(0, 2, 3, 1)
        query, key = F.normalize(self.query(tokens), dim=-1), F.normalize(self.key(tokens), dim=-1)
        total = torch.zeros_like(query[..., 0])
        count = torch.zeros_like(total)
        height, width = total.shape[1:]
        for rows, columns in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            here = (slice(None), _inside(rows, height), _inside(columns, width))
            there = (slice(None), _inside(-rows, height), _inside(-columns, width))
            total[here] += (1 - (query[here] * key[there]).sum(-1)) / 2
            count[here] += 1
        return (total / count.clamp(min=1)).flatten(1).clamp(0, 1)


def _inside(shift: int, size: int) -> slice:
    """The positions whose neighbour ``shift`` away lies on the grid."""
    return slice(max(0, -shift), size - max(0, shift))


ROUTERS: Table[Callable[[int], nn.Module]] = Table(
    "model.router", {"predictability": PredictabilityRouter, "cosine": CosineRouter}
)
"""What ``model.router`` may say: from feature channels D to a module that maps features (B, D, H, W) to (B, L) float32
probabilities of a boundary."""

RouterName = Annotated[str, OneOf(ROUTERS)]
