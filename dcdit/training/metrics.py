"""What a training step logs, and how the processes put it together."""

import torch
from torch import Tensor

from dcdit.diffusion.loss import DiffusionLoss
from dcdit.network import Routing


def step_metrics(diffusion: DiffusionLoss, drop_fraction: float) -> dict[str, Tensor]:
    """Of the diffusion loss: scalars by name."""
    loss = diffusion.total.mean()
    found = {"train/diffusion_loss": loss, "train/mse": diffusion.mse.mean()}
    if diffusion.vlb is not None:
        found["train/vlb"] = diffusion.vlb.mean()
    return {**found, "train/drop_fraction": loss.new_tensor(drop_fraction)}


def routing_metrics(routing: Routing, world_size: int) -> dict[str, Tensor]:
    """Of the router: keep ratios and, of several processes, the tokens that fall on each; scalars by name."""
    kept = routing.natural_mask.float().mean(dim=1)
    found = {
        "train/keep_ratio": kept.mean(),
        "train/keep_ratio_min": kept.min(),
        "train/keep_ratio_max": kept.max(),
        "train/keep_ratio_after_drop": routing.mask.float().mean(),
    }
    if world_size > 1:
        tokens = routing.mask.sum().float()
        found |= {f"train/tokens_per_rank{word}": tokens for word in ("", "_min", "_max")}
    return found


class BatchMetrics:
    """What the micro-batches of an optimiser step found, put together: the metrics of the whole batch."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Those of another micro-batch, all of one size."""
        self._parts.append({name: value.detach().float() for name, value in metrics.items()})

    def take(self) -> dict[str, Tensor]:
        """Those of the batch: means, sums of tokens, and least and greatest values where the name says so."""
        parts, self._parts = self._parts, []
        found = {}
        for name in parts[0]:
            values = torch.stack([part[name] for part in parts])
            ending = name.rpartition("_")[2]
            if "tokens" in name:
                found[name] = values.sum()
            elif ending in ("min", "max"):
                found[name] = values.amin() if ending == "min" else values.amax()
            else:
                found[name] = values.mean()
        return found


def over_ranks(metrics: dict[str, Tensor], world_size: int) -> dict[str, Tensor]:
    """What all ranks found, in one exchange: means, and least and greatest values where the name says so."""
    own = torch.stack([value.float() for value in metrics.values()])
    found = own.new_empty(world_size * len(own))
    torch.distributed.all_gather_into_tensor(found, own)
    found = found.view(world_size, len(own))
    ends = {"min": found.amin(dim=0), "max": found.amax(dim=0)}
    mean = found.mean(dim=0)
    return {name: ends.get(name.rpartition("_")[2], mean)[i] for i, name in enumerate(metrics)}
