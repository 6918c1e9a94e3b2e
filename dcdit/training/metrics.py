"""The metrics that a training step logs, and how those of micro-batches and processes are combined."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dcdit.diffusion.loss import DiffusionLoss
from dcdit.network import Routing

_OVER_MICRO_BATCHES: Mapping[str, Callable[..., Tensor]] = {
    "train/keep_ratio_min": torch.amin,
    "train/keep_ratio_max": torch.amax,
    **dict.fromkeys(("train/tokens_per_rank", "train/tokens_per_rank_min", "train/tokens_per_rank_max"), torch.sum),
}
_OVER_RANKS: Mapping[str, Callable[..., Tensor]] = {
    "train/keep_ratio_min": torch.amin,
    "train/keep_ratio_max": torch.amax,
    "train/tokens_per_rank_min": torch.amin,
    "train/tokens_per_rank_max": torch.amax,
}
"""How metrics are combined; all others are averaged."""


def step_metrics(diffusion: DiffusionLoss, drop_fraction: float) -> dict[str, Tensor]:
    """Return the metrics of the diffusion loss: scalars by name."""
    loss = diffusion.total.mean()
    metrics = {"train/diffusion_loss": loss, "train/mse": diffusion.mse.mean()}
    if diffusion.vlb is not None:
        metrics["train/vlb"] = diffusion.vlb.mean()
    return {**metrics, "train/drop_fraction": loss.new_tensor(drop_fraction)}


def routing_metrics(routing: Routing, world_size: int) -> dict[str, Tensor]:
    """Return the metrics of the router, scalars by name: keep ratios and, of several processes, the tokens of each."""
    kept = routing.natural_mask.float().mean(dim=1)
    metrics = {
        "train/keep_ratio": kept.mean(),
        "train/keep_ratio_min": kept.min(),
        "train/keep_ratio_max": kept.max(),
        "train/keep_ratio_after_drop": routing.mask.float().mean(),
    }
    if world_size > 1:
        tokens = routing.mask.sum().float()
        metrics |= {f"train/tokens_per_rank{word}": tokens for word in ("", "_min", "_max")}
    return metrics


Operation = Literal["mean", "sum", "min", "max"]


@dataclass(frozen=True)
class Reduction:
    """How the values of a metric become one.

    Attributes:
        over_batches: of the micro-batches of an optimiser step.
        over_ranks: of the processes.
    """

    over_batches: Operation = "mean"
    over_ranks: Operation = "mean"


REDUCTIONS = {
    "train/keep_ratio_min": Reduction("min", "min"),
    "train/keep_ratio_max": Reduction("max", "max"),
    "train/tokens_per_rank": Reduction("sum", "mean"),
    "train/tokens_per_rank_min": Reduction("sum", "min"),
    "train/tokens_per_rank_max": Reduction("sum", "max"),
}
"""Of the metrics that are no plain means."""


def _reduce(values: Tensor, operation: Operation) -> Tensor:
    """(n, ...) to (...)."""
    if operation in ("min", "max"):
        return values.amin(dim=0) if operation == "min" else values.amax(dim=0)
    return values.mean(dim=0) if operation == "mean" else values.sum(dim=0)


class BatchMetrics:
    """The metrics of the micro-batches of an optimiser step, put together to those of the whole batch."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of another micro-batch; all micro-batches have one size."""
        self._parts.append({name: value.detach().float() for name, value in metrics.items()})

    def take(self) -> dict[str, Tensor]:
        """Return the metrics of the whole batch, reduced as :data:`REDUCTIONS` says, and begin the next one."""
        parts, self._parts = self._parts, []
        reduced = {}
        for name in parts[0]:
            values = torch.stack([part[name] for part in parts])
            reduced[name] = _reduce(values, REDUCTIONS.get(name, Reduction()).over_batches)
        return reduced


def over_ranks(metrics: dict[str, Tensor], world_size: int) -> dict[str, Tensor]:
    """Reduce the metrics of all ranks as :data:`REDUCTIONS` says, in one exchange."""
    own = torch.stack([value.float() for value in metrics.values()])
    gathered = own.new_empty(world_size * len(own))
    torch.distributed.all_gather_into_tensor(gathered, own)
    operations: tuple[Operation, ...] = get_args(Operation)
    reduced = {operation: _reduce(gathered.view(world_size, len(own)), operation) for operation in operations}
    return {name: reduced[REDUCTIONS.get(name, Reduction()).over_ranks][i] for i, name in enumerate(metrics)}
