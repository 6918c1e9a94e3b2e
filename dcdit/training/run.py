"""A run from its configuration to its outcome, in seven phases."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml

from dcdit.checkpoints.load import Model
from dcdit.checks import call_checked, to_plain
from dcdit.data.datamodule import LatentDataModule
from dcdit.errors import UserError
from dcdit.network import build_network
from dcdit.network.execution import describe_execution, is_compiled, set_execution
from dcdit.runs.changes import Change, changes, describe_changes
from dcdit.runs.lock import sole_writer
from dcdit.runs.resume import (
    LAST,
    find_checkpoints,
    is_finished,
    leave_queue,
    resuming_command,
    state_at_start,
    write_state,
)
from dcdit.runs.saved import CONFIG_NAME
from dcdit.runs.state import Outcome, RunState, State
from dcdit.runtime.files import write_json, write_text
from dcdit.runtime.memory import configure_memory
from dcdit.runtime.processes import rank, say
from dcdit.settings.compose import with_run_id
from dcdit.settings.plugins import describe_unfindable, words_of_plugins
from dcdit.training.batching import check_devices, describe_split, recorded_settings, with_accelerator
from dcdit.training.build import build_trainer, check_network, match_compute
from dcdit.training.callbacks.checkpoint import Checkpoint
from dcdit.training.callbacks.interrupt import StopOnInterrupt
from dcdit.training.fitting import out_of_memory, with_micro_batch
from dcdit.training.initial_weights import Start
from dcdit.training.loggers import keep_going
from dcdit.training.module import DCDiTModule
from dcdit.training.resume import Resumed, check_resumed, open_first_whole
from dcdit.training.settings import TrainConfig


def run_training(config: TrainConfig, patience: float = 0.0, inside_job: bool = False) -> Outcome:
    """Train in ``config.run_dir``, which is made if it is not there.

    Args:
        patience: seconds to wait for another process that is about to let go of the run.
        inside_job: whether a cluster's job starts the run again if it is interrupted.

    Returns:
        Whether it finished or was interrupted, at which step, and its last metrics.

    Raises:
        UserError: naming key, value and remedy; everything that can be wrong is checked before the first step.
    """
    config = check_network(match_compute(with_accelerator(config)))
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with sole_writer(run_dir, rank(), patience):
        before, checkpoints = RunState.read(run_dir), find_checkpoints(config.ckpt_path, run_dir)
        config = with_micro_batch(config, before if checkpoints else None)
        if before and has_finished(before, config, checkpoints):
            return leave_finished(before, config)
        resumed, changed, state = open_run(config, before, checkpoints)
        data = open_data(config)
        training = build_training(config, state, resumed, data)
        del resumed  # Lightning frees the memory of the checkpoint when nothing else refers to it
        write_start(training, changed)
        fit(training)
        return write_outcome(training, inside_job)


def has_finished(before: RunState, config: TrainConfig, checkpoints: Sequence[Path]) -> bool:
    """Whether nothing of the run is left to do; from an earlier checkpoint that is named, there is."""
    newest = config.ckpt_path in ("auto", "last") or (bool(checkpoints) and checkpoints[0].name == LAST)
    return bool(checkpoints) and newest and is_finished(before, config.trainer.max_steps)


def leave_finished(before: RunState, config: TrainConfig) -> Outcome:
    """Say that a run has finished, and return its outcome; UserError if ``config`` is no longer that of the run."""
    changes(before.settings, recorded_settings(config), before.step, config.ckpt_path == "auto")
    leave_queue(Path(config.run_dir))
    where = f"{os.path.relpath(config.run_dir)} is finished, at step {before.step}"
    say(f"{where}: train on with a larger trainer.max_steps")
    return Outcome(State.FINISHED, before.step, before.metrics)


def open_run(
    config: TrainConfig, before: RunState | None, checkpoints: Sequence[Path]
) -> tuple[Resumed | None, tuple[Change, ...], RunState]:
    """Read the earlier part of a run, if there is one, and compare it with ``config``; writes nothing.

    Returns:
        The checkpoint that the run goes on from, the values that changed since, and the state of the run from now on.

    Raises:
        UserError: if the run cannot go on, or this machine cannot do what is asked for.
    """
    run_dir = Path(config.run_dir)
    if before and not checkpoints and (config.callbacks or {}).get("checkpoint"):
        check_record(before, run_dir)
    check_devices(config)
    resumed = open_first_whole(checkpoints)
    settings = recorded_settings(config)
    changed = changes(resumed.settings, settings, resumed.step, config.ckpt_path == "auto") if resumed else ()
    state = state_at_start(
        before,
        run_dir,
        config.trainer.max_steps,
        step=resumed.step if resumed else 0,
        run_id=config.run_id,
        max_restarts=config.cluster.get("max_restarts"),
        batch_size=config.batch_size,
        settings=settings,
        changed=changed,
    )
    return resumed, changed, state


def check_record(before: RunState, run_dir: Path) -> None:
    """Raise :class:`UserError` if an earlier part of the run was saved, and its checkpoints are gone."""
    if before.step and before.state in (State.FINISHED, State.INTERRUPTED):
        raise UserError(
            f"run_dir={run_dir}: {before.step} steps of this run were done and saved, but its checkpoints are gone."
            " Restore them, or delete the directory to start anew, or take another run_name"
        )


def open_data(config: TrainConfig) -> LatentDataModule:
    """Return the data, written if they write themselves; UserError if they cannot be trained on.

    Such as by batches that exceed them, or a validation split of other latents.
    """
    data = call_checked(LatentDataModule, config.data, "data", {"features": config.alignment.feature_source})
    data.prepare_data()
    samples = data.manifest().samples
    data.validation()
    data.companion()
    if data.batch_size > samples:
        raise UserError(
            f"data.batch_size={data.batch_size} exceeds the {samples} samples in {data.location.root}: lower"
            " data.batch_size"
        )
    return data


@dataclass(frozen=True)
class Training:
    """Everything that training needs, built and compared with the checkpoint that it goes on from.

    Attributes:
        start: what the weights came from.
        step: optimiser steps done before.
        checkpoint: what it goes on from.
    """

    config: TrainConfig
    state: RunState
    start: Start
    data: LatentDataModule
    module: DCDiTModule
    trainer: pl.Trainer
    interrupt: StopOnInterrupt
    step: int
    checkpoint: Path | None

    @property
    def run_dir(self) -> Path:
        """The directory of the run."""
        return Path(self.config.run_dir)


def build_training(config: TrainConfig, state: RunState, resumed: Resumed | None, data: LatentDataModule) -> Training:
    """Build what trains, with the weights that it starts from; UserError if something does not fit."""
    manifest = data.manifest()
    configure_memory()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    network, process = build_network(config.model), config.diffusion.build()
    manifest.spec.check_network(network)
    network.to(memory_format=torch.channels_last)  # which convolutions prefer, on CPUs and tensor cores
    half, execution = "bf16" in str(config.trainer.precision), config.execution
    compiled = is_compiled(network, config.trainer.accelerator, half, execution.compile)
    set_execution(network, compiled, execution.activation_checkpointing)
    step = resumed.step if resumed else 0
    model = Model(network, manifest.spec, step, process, {"multi_budget": to_plain(config.multi_budget)})
    start = config.init.start(model, config.paths.runs)
    earlier = resumed.trained.training.get("init") if resumed else None
    alignment = config.alignment.build(network, manifest)
    init = start.record_after(earlier)
    module = DCDiTModule(network, process, config, manifest.spec, start.distillation, alignment, init)
    if resumed:
        check_resumed(resumed, module, manifest)
    interrupt = StopOnInterrupt()
    trainer = build_trainer(config, interrupt, state.id, resumed.trained.values if resumed else None)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoint):
            callback.check_best(trainer, data.validation() is not None)
    start = replace(start, distillation=None)  # the module alone holds the teacher, and lets it go
    checkpoint = resumed.path if resumed else None
    return Training(config, state, start, data, module, trainer, interrupt, step, checkpoint)


def write_start(training: Training, changed: tuple[Change, ...]) -> None:
    """Say and write down what is trained; nothing was written to the run's directory before."""
    start, run_dir = training.start, training.run_dir
    if start.checkpoint and not training.step:
        say(start.describe())
        if not rank():
            names = {key: list(getattr(start, key)) for key in ("loaded", "new", "left", "frozen")}
            write_json(run_dir / "init.json", {**start.record, **names})
    for line in describe_training(training):
        say(line)
    describe_optimizer(training)
    if changed:
        say(describe_changes(changed))
    write_settings(training)
    write_state(training.state, run_dir)
    leave_queue(run_dir)  # after the state: a run that has left the queue with the state of an earlier start has ended


def write_settings(training: Training) -> None:
    """Write the resolved configuration beside the checkpoints, and hand it to the loggers."""
    private = ("cluster", "resume")  # whose account paid, and a path of this machine
    values = {key: value for key, value in to_plain(training.config).items() if key not in private}
    settings = {**with_run_id(values, training.state.id), "run_id": training.state.id}
    if not rank():
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_text(training.run_dir / CONFIG_NAME, text)
    for logger in training.trainer.loggers:
        logger.log_hyperparams(settings)


def fit(training: Training) -> None:
    """Train, without an end if only a logger fails."""
    for logger in training.trainer.loggers:
        keep_going(logger)
    try:
        training.trainer.fit(training.module, training.data, ckpt_path=training.checkpoint)
    except torch.OutOfMemoryError as error:
        step, routes = training.trainer.global_step, training.module.network.routes
        raise out_of_memory(error, training.config, step, routes) from error
    finally:
        if "wandb" in sys.modules:  # the next run of a sweep, in this process, would go on with the same curves
            sys.modules["wandb"].finish()


def write_outcome(training: Training, inside_job: bool) -> Outcome:
    """Say and write down how training ended, and return it."""
    trainer = training.trainer
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    outcome = Outcome(training.interrupt.outcome(trainer), trainer.global_step, metrics)
    state = replace(training.state, state=outcome.state, step=outcome.step, metrics=metrics, time=time.time())
    write_state(state, training.run_dir)
    say(describe_outcome(outcome, training.run_dir, inside_job))
    trainer.strategy.barrier()  # a process that leaves a job early takes the others with it
    return outcome


def describe_training(training: Training) -> list[str]:
    """Describe what is trained and how, on how many processes, and from which step on, line by line."""
    config, network, processes = training.config, training.module.network, training.trainer.world_size
    parameters = sum(parameter.numel() for parameter in network.parameters())
    how = describe_execution(network, config.trainer.accelerator, config.trainer.precision)
    whole = (
        f"Training {network.title} with {parameters / 1e6:.1f}M parameters for {config.trainer.max_steps} steps"
        f" of {config.batch_size} samples, {how}"
        + (f" on {processes} processes" if processes > 1 else "")
        + f", in {os.path.relpath(config.run_dir)}"
        + (f", on from step {training.step}" if training.step else "")
    )
    useless = config.execution.capacity == "auto" and not network.routes
    alignment = training.module.alignment
    lines = [whole, describe_split(config, network.routes), alignment.description if alignment else ""]
    lines.append(describe_unfindable(training.module.hparams))
    lines += [f"execution.capacity=auto changes nothing: {network.title} drops no tokens"] if useless else []
    late, steps = config.multi_budget.full_budget_steps, config.trainer.max_steps
    if network.routes and (any(config.multi_budget.fractions) or config.multi_budget.path_drop) and late >= steps:
        lines.append(
            f"multi_budget.full_budget_steps={late}: none of the {steps} steps drops tokens or the backbone, so the"
            " network will not be trained for smaller budgets"
        )
    return [line for line in lines if line]


def describe_optimizer(training: Training) -> None:
    """Say and write down which parameters Muon trains, if it trains any."""
    matrices = training.config.optimizer.matrices(training.module.network)
    if not matrices:
        return
    names: dict[str, list[str]] = {"muon": [], "adamw": []}
    for name, parameter in training.module.named_parameters():
        if parameter.requires_grad:
            names["muon" if parameter in matrices else "adamw"].append(name.removeprefix("network."))
    say(
        f"Muon trains {sum(matrices.values())} matrices in {len(names['muon'])} weights of the transformer blocks,"
        f" {sum(weight.numel() for weight in matrices) / 1e6:.1f}M parameters; AdamW the other {len(names['adamw'])}"
        " parameter tensors"
    )
    if not rank():
        write_json(training.run_dir / "optimizer.json", names)


def describe_outcome(outcome: Outcome, run_dir: Path, inside_job: bool) -> str:
    """Describe how the run ended, and the command that comes next."""
    last = run_dir / "checkpoints" / LAST
    checkpoint = shlex.quote(f"checkpoint={os.path.relpath(run_dir)}")
    if outcome.state is State.INTERRUPTED:
        resume = "" if inside_job else f" Resume: {resuming_command(run_dir)}"
        return f"Stopped and saved at step {outcome.step}.{resume}"
    sample = f" Sample: python -m dcdit.sample{words_of_plugins()} {checkpoint}" if last.exists() else ""
    return f"Finished at step {outcome.step}.{sample}"
