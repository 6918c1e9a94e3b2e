"""The metrics that a training step logs, and how those of micro-batches and processes are combined."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dcdit.diffusion.loss import DiffusionLoss
from dcdit.network import Routing

_OVER_RANKS: Mapping[str, Callable[..., Tensor]] = {
    "train/keep_ratio_min": torch.amin,
    "train/keep_ratio_max": torch.amax,
    "train/tokens_per_rank_min": torch.amin,
    "train/tokens_per_rank_max": torch.amax,
}
_TOKENS = ("train/tokens_per_rank", "train/tokens_per_rank_min", "train/tokens_per_rank_max")
_OVER_MICRO_BATCHES: Mapping[str, Callable[..., Tensor]] = {**_OVER_RANKS, **dict.fromkeys(_TOKENS, torch.sum)}
"""How metrics are combined; all others are averaged."""


def step_metrics(diffusion: DiffusionLoss, drop_fraction: float) -> dict[str, Tensor]:
    """The metrics of the diffusion loss: scalars by name."""
    loss = diffusion.total.mean()
    metrics = {"train/diffusion_loss": loss, "train/mse": diffusion.mse.mean()}
    if diffusion.vlb is not None:
        metrics["train/vlb"] = diffusion.vlb.mean()
    if diffusion.cosine is not None:
        metrics["train/velocity_cosine"] = diffusion.cosine.mean()
    return {**metrics, "train/drop_fraction": loss.new_tensor(drop_fraction)}


def routing_metrics(routing: Routing, world_size: int) -> dict[str, Tensor]:
    """The metrics of the router, scalars by name: keep ratios, tokens of this process, and what a capacity dropped."""
    keep_ratios = routing.natural_mask.float().mean(dim=1)
    metrics = {
        "train/keep_ratio": keep_ratios.mean(),
        "train/keep_ratio_min": keep_ratios.min(),
        "train/keep_ratio_max": keep_ratios.max(),
        "train/keep_ratio_after_drop": routing.mask.float().mean(),
    }
    tokens = routing.mask.sum().float()
    if routing.beyond is not None:
        beyond = routing.beyond.sum()
        metrics["train/dropped_by_capacity"] = beyond / (tokens + beyond)
    return metrics | dict.fromkeys(_TOKENS if world_size > 1 else _TOKENS[:1], tokens)


class BatchMetrics:
    """Collects the metrics of the micro-batches of an optimiser step, and combines them to those of the batch."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of a micro-batch; all micro-batches have the same size."""
        self._parts.append({name: value.detach().float() for name, value in metrics.items()})

    def take(self) -> dict[str, Tensor]:
        """The metrics of the batch; the next one starts empty."""
        parts, self._parts = self._parts, []
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return {name: _OVER_MICRO_BATCHES.get(name, torch.mean)(values, dim=0) for name, values in stacked.items()}


def over_ranks(metrics: dict[str, Tensor], world_size: int) -> dict[str, Tensor]:
    """Combine the metrics of all ranks, in one exchange."""
    own = torch.stack([value.float() for value in metrics.values()])
    gathered = own.new_empty(world_size * len(own))
    torch.distributed.all_gather_into_tensor(gathered, own)
    gathered = gathered.view(world_size, len(own))
    return {name: _OVER_RANKS.get(name, torch.mean)(gathered, dim=0)[i] for i, name in enumerate(metrics)}
