"""How a batch is split over processes and micro-batches."""

import torch

from dcdit.data.order import micro_batch
from dcdit.errors import UserError
from dcdit.runtime.processes import processes
from dcdit.training.settings import TrainPlan


def world_size(plan: TrainPlan) -> int:
    """Processes that the trainer will use."""
    number = plan.trainer.device_count
    if number is None:  # as many as there are
        number = max(1, torch.cuda.device_count()) if plan.trainer.on_gpu else 1
    return number * plan.trainer.num_nodes


def accumulation(plan: TrainPlan, world: int) -> int:
    """Micro-batches of an optimiser step on each of ``world`` processes, which keep ``data.batch_size`` what it says.

    Raises:
        UserError: if the batch cannot be split so.
    """
    batch, most, steps = plan.batch_size, plan.execution.max_micro_batch, plan.trainer.accumulate_grad_batches
    if most is not None and steps != 1:
        raise UserError(
            f"execution.max_micro_batch={most} and trainer.accumulate_grad_batches={steps} are two ways to say how a"
            " batch is split, take one"
        )
    micro_batch(batch, world, steps)
    if most is None:
        return steps
    own = batch // world
    return next(steps for steps in range(-(-own // most), own + 1) if own % steps == 0)


def check_devices(plan: TrainPlan) -> None:
    """Raise :class:`UserError` if the trainer asks for a GPU that is not there, or not for the processes that are."""
    trainer, started = plan.trainer, processes()[1]
    if started not in (1, world_size(plan)):
        raise UserError(
            f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}, but {started} processes were"
            " started: set trainer.devices to those of each node"
        )
    if trainer.on_gpu and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={trainer.accelerator}: this machine has no usable CUDA device; train on the CPU with"
            " trainer=cpu, or try the run out with debug=tiny"
        )


def check_local_sweep(plan: TrainPlan) -> None:
    """Raise :class:`UserError` unless each run of a sweep on this machine is one process."""
    if world_size(plan) > 1 or processes()[1] > 1:
        raise UserError(
            f"trainer.devices={plan.trainer.devices} x trainer.num_nodes={plan.trainer.num_nodes}: runs of a sweep on"
            " this machine are one process each. Set trainer.devices=1, start each run by itself, or sweep on a cluster"
            " with cluster=slurm"
        )
