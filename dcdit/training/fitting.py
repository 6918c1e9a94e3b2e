"""``execution.max_micro_batch=auto``: the largest micro-batch that fits the memory of a GPU, found by trying."""

from collections.abc import Callable
from dataclasses import replace

import torch

from dcdit.errors import TrainingError, UserError
from dcdit.network import build_network
from dcdit.network.execution import is_compiled, set_execution
from dcdit.runs.state import RunState
from dcdit.runtime.processes import say
from dcdit.training.auxiliary import Noisy, record_hidden_states
from dcdit.training.batching import accumulation, world_size
from dcdit.training.settings import TrainConfig

LARGEST_SHARE = 0.85
"""Share of the GPU's memory that the trial may take; the rest is for EMA, fragments, and other programs."""


def with_micro_batch(config: TrainConfig, before: RunState | None) -> TrainConfig:
    """Return ``config`` with the number that ``max_micro_batch=auto`` stands for.

    A run that goes on takes the number that it began with; on a CPU the whole batch is one micro-batch.

    Raises:
        UserError: if not even one sample fits, or the run has several processes, which must agree on the number.
    """
    if config.execution.max_micro_batch != "auto":
        return config
    number: int | None = None
    recorded = before.settings.get("execution.max_micro_batch") if before else None
    if isinstance(recorded, int):
        number = recorded
    elif config.trainer.on_gpu:
        accumulation(config, world_size(config))  # which several processes would have to agree on
        memory = LARGEST_SHARE * torch.cuda.get_device_properties(0).total_memory
        number = largest_micro_batch(lambda size: trial_peak(config, size, torch.device("cuda")) <= memory, config)
        say(f"execution.max_micro_batch={number} is the largest that fits")
    else:
        say(f"execution.max_micro_batch=auto splits no batch on {config.trainer.accelerator}: it finds what fits a GPU")
    return replace(config, execution=replace(config.execution, max_micro_batch=number))


def largest_micro_batch(fits: Callable[[int], bool], config: TrainConfig) -> int:
    """Return the largest size of micro-batches that divides the batch and fits.

    Args:
        fits: whether a micro-batch of a size fits; it may run out of memory.

    Raises:
        UserError: if not even one sample fits.
    """
    for size in range(config.batch_size, 0, -1):
        if config.batch_size % size:
            continue
        try:
            if fits(size):
                return size
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    raise UserError(
        "execution.max_micro_batch=auto: not even one sample fits the memory of the GPU: take a smaller model, or"
        " execution.activation_checkpointing=true"
    )


def trial_peak(config: TrainConfig, size: int, device: torch.device) -> int:
    """Do one training step on random latents, and return the most bytes that tensors on a GPU held; 0 on a CPU.

    Args:
        size: samples of the step.
    """
    network, process = build_network(config.model).to(device), config.diffusion.build().to(device)
    half = "bf16" in str(config.trainer.precision)
    compiled = is_compiled(network, device.type, half, config.execution.compile)
    set_execution(network, compiled, config.execution.activation_checkpointing)
    alignment, parts = config.alignment.build(network, None), network.parts()
    if alignment is not None:
        alignment.to(device).move(device)
        parts["alignment"] = alignment
    optimizer = config.optimizer.build(parts)
    # without a capacity a fresh router may keep all positions for a few steps (docs/performance.md)
    room = {"capacity": config.capacity or 1.0} if network.routes else {}
    x0 = torch.randn(size, network.channels, *network.grid, device=device)
    noise, t = torch.randn_like(x0), process.draw_times(size, None, device)
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    xt = process.add_noise(x0, noise, t)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        with record_hidden_states(network, alignment.states if alignment is not None else ()) as hidden:
            output = network(xt, t, labels, 0.0, **room)
        noisy = Noisy(xt, t, labels, x0, noise)
        aligned = alignment.loss(hidden, noisy, output.routing) if alignment is not None else 0.0
    (process.loss(output.prediction, x0, xt, noise, t).total.mean() + aligned).backward()
    optimizer.step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def out_of_memory(error: torch.OutOfMemoryError, config: TrainConfig, step: int, routes: bool) -> TrainingError:
    """What to tell and to try when training runs out of a GPU's memory at ``step``; ``routes``: of the network."""
    execution, remedies = config.execution, []
    if routes and config.capacity is None:
        remedies.append("execution.capacity=auto, for a fresh router keeps most positions for a few steps")
    if execution.max_micro_batch is None:
        remedies.append("execution.max_micro_batch=auto, which accumulates gradients of what fits")
    elif execution.max_micro_batch != 1:
        remedies.append(f"an execution.max_micro_batch below {execution.max_micro_batch}")
    if not execution.activation_checkpointing:
        remedies.append("execution.activation_checkpointing=true")
    remedies.append("a smaller data.batch_size")
    first = str(error).partition(". ")[0]
    return TrainingError(
        f"step {step}, data.batch_size={config.batch_size}: {first}. Take {'; or '.join(remedies)}. The same command"
        " goes on from the last checkpoint if there is one"
    )
