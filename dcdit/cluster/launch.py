"""Submit the runs of a sweep as a job array of SLURM, and wait for them by their directories."""

import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from dcdit.checks import call_checked
from dcdit.cluster.settings import ClusterSettings, cluster_of, read_cluster, sbatch_parameters
from dcdit.errors import UserError
from dcdit.runs.changes import changes
from dcdit.runs.failure import note_failure
from dcdit.runs.lock import is_held
from dcdit.runs.progress import progress_of
from dcdit.runs.resume import checkpoints_in, is_finished
from dcdit.runs.state import QUEUED_NAME, RunState, State
from dcdit.runtime.processes import say
from dcdit.settings.compose import plain_values
from dcdit.training.build import check_network, match_compute
from dcdit.training.settings import TrainConfig

FOLDER = ".submitit"
GONE = 3
"""Looks at the queue in a row without a job, after which it is gone; it is missing for a moment when queued again."""


class Draft(SlurmExecutor):
    """Writes scripts on machines without SLURM as well."""

    @classmethod
    def affinity(cls) -> int:
        """Always usable."""
        return 1


def run_dir_of(config: DictConfig) -> Path:
    """Where a job of a sweep will run."""
    HydraConfig.instance().set_config(config)  # for the resolver in the directory's name
    return Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()


def launch(
    job: Callable[..., JobReturn],
    configs: Sequence[DictConfig],
    overrides: Sequence[Sequence[str]],
    first: int,
) -> list[JobReturn]:
    """Submit ``job`` once for each configuration; every mistake is found before the first is submitted.

    Args:
        job: what runs in the job, with the arguments of Hydra's submitit launcher.
        configs: the composed configurations, with their ``hydra`` part.
        overrides: what they were composed from.
        first: number of the first one in the sweep.

    Returns:
        What each run says at its end.

    Raises:
        UserError: if a value is wrong, or SLURM takes none of it.
        SystemExit: where there is nothing to wait for.
    """
    place = Path(configs[0].hydra.sweep.dir)
    try:
        asked = [read_config(config) for config in configs]
        typed = [config for config in asked if isinstance(config, TrainConfig)]
        if not typed:
            raise next(error for error in asked if isinstance(error, UserError))
        clusters = [cluster_of(config) for config in typed]
        if any(each != clusters[0] for each in clusters):
            raise UserError("cluster.*: all runs of a sweep are one job array and need the same; submit them apart")
    except UserError:
        leave_nothing(place)
        raise
    cluster, runs = clusters[0], [run_dir_of(config) for config in configs]
    folder = place.absolute() / FOLDER
    parameters = sbatch_parameters(cluster, configs[0].run_name, folder)
    if cluster.dry_run:
        print(draft(folder, parameters, len(runs)))
        leave_nothing(place)
        raise SystemExit(0)
    state = Singleton.get_state()
    due = [number for number, run in enumerate(runs) if is_due(run, asked[number], overrides[number])]
    arguments = [(list(overrides[n]), "hydra.sweep.dir", first + n, f"job_id_for_{first + n}", state) for n in due]
    if due:
        names = submit(job, arguments, folder, parameters, [runs[n] for n in due])
        jobs = {name: runs[n] for name, n in zip(names, due, strict=True)}
        array = names[0].split("_")[0]
        say(f"Submitted {', '.join(jobs)}. Follow: python -m dcdit.status {place}   End: scancel {array}")
        if not cluster.wait:
            raise SystemExit(0)
        wait(jobs, cluster, place.absolute())
    return [returned(run, words, config) for run, words, config in zip(runs, overrides, configs, strict=True)]


def read_config(values: DictConfig) -> TrainConfig | UserError:
    """A configuration, or what is wrong with it, which :func:`is_due` tells; UserError if it is the cluster."""
    plain = plain_values(TrainConfig, values)
    read_cluster(plain["cluster"])  # before what follows from it
    try:
        return call_checked(TrainConfig, plain, "")
    except UserError as error:
        return error


def is_due(run: Path, asked: TrainConfig | UserError, overrides: Sequence[str]) -> bool:
    """Whether a run needs a job; says why where it does not, and writes down what is wrong with it.

    Args:
        run: its directory.
        asked: its configuration, or what is wrong with it.
        overrides: what it was composed from.
    """
    name = os.path.relpath(run)
    if is_held(run):
        say(f"{name} is being trained right now: left alone")
        return False
    try:
        if isinstance(asked, UserError):
            raise asked
        config = match_compute(asked)
        check_network(config)
        before = RunState.read(run)
        if before is not None and before.settings and checkpoints_in(run / "checkpoints"):
            changes(before.settings, config.recorded, before.step, by_itself=True)
    except UserError as error:
        run.mkdir(parents=True, exist_ok=True)
        note_failure(error, run, tuple(overrides), sweeping=True)
        say(f"{name}: {error}")
        return False
    if is_finished(before, config.trainer.max_steps):
        say(f"{name} is finished: left alone")
        return False
    if (run / QUEUED_NAME).exists():
        say(f"{name} was submitted before and has not begun; of two jobs the second finds it taken")
    return True


def leave_nothing(place: Path) -> None:
    """Take away what Hydra wrote for a sweep that is not submitted."""
    if place.is_dir() and {path.name for path in place.iterdir()} <= {"multirun.yaml"}:
        shutil.rmtree(place)


def draft(folder: Path, parameters: Mapping[str, Any], jobs: int) -> str:
    """The script that sbatch would get."""
    executor = Draft(folder)
    executor.update_parameters(**parameters)
    if jobs > 1:
        executor.parameters["map_count"] = jobs
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(
    job: Callable[..., JobReturn],
    arguments: Sequence[tuple[Any, ...]],
    folder: Path,
    parameters: Mapping[str, Any],
    runs: Sequence[Path],
) -> list[str]:
    """Hand the jobs of ``runs`` to SLURM; returns their names.

    Raises:
        UserError: if there is no SLURM, or it refuses them.
    """
    try:
        executor = SlurmExecutor(folder)
    except RuntimeError:
        raise UserError(
            "cluster=slurm: there is no SLURM on this machine (no srun). Submit from the cluster, look at the script"
            " with cluster.dry_run=true, or take cluster=local"
        ) from None
    executor.update_parameters(**parameters)
    for run in runs:  # before a job may start and take the note away
        run.mkdir(parents=True, exist_ok=True)
        (run / QUEUED_NAME).touch()
    try:
        return [each.job_id for each in executor.map_array(job, *zip(*arguments, strict=True))]
    except (FailedJobError, OSError) as error:
        for run in runs:
            (run / QUEUED_NAME).unlink()
        raise UserError(
            f"cluster=slurm: sbatch refused the job: {str(error).strip()}\n(Is this a machine of the cluster? Else"
            " SLURM_CONF says where its slurm.conf is.)"
        ) from None


def wait(jobs: Mapping[str, Path], cluster: ClusterSettings, place: Path) -> None:
    """Until every run has finished or failed, or its job is gone.

    Args:
        jobs: their runs, by name.
        cluster: the settings.
        place: directory of the sweep, for messages.
    """
    left, missed = dict(jobs), dict.fromkeys(jobs, 0)
    while left:
        try:
            time.sleep(cluster.poll_seconds)
        except KeyboardInterrupt:
            say(f"\nThe jobs go on. Follow: python -m dcdit.status {os.path.relpath(place)}")
            raise
        queued = in_queue(next(iter(jobs)).split("_")[0])
        for name, run in list(left.items()):
            if not has_ended(run):
                missed[name] = missed[name] + 1 if queued is not None and name not in queued else 0
                if missed[name] < GONE:
                    continue
                note_gone(run, name)
            del left[name]
            progress = progress_of(run, "")
            what = str(run.relative_to(place)) if run != place else run.name
            say(f"{what}: {progress.state.value} at step {progress.step} ({len(left)} of {len(jobs)} runs left)")


def has_ended(run: Path) -> bool:
    """Whether the run has said its last word since it was submitted."""
    state = RunState.read(run)
    return state is not None and state.state in (State.FINISHED, State.FAILED) and not (run / QUEUED_NAME).exists()


def in_queue(job: str) -> set[str] | None:
    """The jobs of an array that wait or run; None if SLURM does not answer."""
    line = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={job}"]
    answer = subprocess.run(line, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if answer.returncode == 0:
        return set(answer.stdout.split())
    return set() if "Invalid job id" in answer.stderr else None


def note_gone(run: Path, name: str) -> None:
    """A job left the queue without a word; what its run says of itself stays, and where it says nothing this does."""
    (run / QUEUED_NAME).unlink(missing_ok=True)
    if RunState.read(run) is None:
        reason = f"job {name} was cancelled, or ended before the run began: look into {FOLDER} beside the runs"
        RunState(State.FAILED, reason=reason).write(run)


def returned(run: Path, overrides: Sequence[str], config: DictConfig) -> JobReturn:
    """What the sweeper learns of a run: its validation loss, NaN if it failed."""
    state = RunState.read(run)
    finished = state is not None and state.state is State.FINISHED
    value = state.metrics.get("val/diffusion_loss") if finished and state else math.nan
    return JobReturn(overrides=list(overrides), cfg=config, status=JobStatus.COMPLETED, _return_value=value)
