"""Submit the runs of a sweep as a job array of SLURM, and wait for them by their directories."""

import math
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
from dcdit.training.batching import recorded_settings
from dcdit.training.build import check_network, match_compute
from dcdit.training.settings import TrainConfig

FOLDER = ".submitit"
MISSED_POLLS = 3
"""Polls of the queue in a row that miss a job before it counts as gone; a job that is queued again vanishes briefly."""


class ScriptWriter(SlurmExecutor):
    """An executor that writes scripts on machines without SLURM as well."""

    @classmethod
    def affinity(cls) -> int:
        """Tell submitit that the executor is always usable."""
        return 1


def run_dir_of(config: DictConfig) -> Path:
    """The directory in which a job of a sweep will run."""
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
        overrides: of the command line, for each configuration.
        first: number of the first one in the sweep.

    Returns:
        The outcome of each run, for the sweeper.

    Raises:
        UserError: if a value is wrong, or SLURM refuses the jobs.
        SystemExit: if there is nothing to wait for.
    """
    sweep_dir = Path(configs[0].hydra.sweep.dir)
    try:
        checked = [config_or_error(config) for config in configs]
        cluster = common_cluster(checked)
    except UserError:
        remove_empty_sweep(sweep_dir)
        raise
    runs = [run_dir_of(config) for config in configs]
    folder = sweep_dir.absolute() / FOLDER
    parameters = sbatch_parameters(cluster, configs[0].run_name, folder)
    if cluster.dry_run:
        remove_empty_sweep(sweep_dir)
        faults = [(run, outcome) for run, outcome in zip(runs, checked, strict=True) if isinstance(outcome, UserError)]
        if faults:
            raise UserError("\n".join(f"{os.path.relpath(run)}: {fault}" for run, fault in faults))
        print(job_script(folder, parameters, len(runs)))
        raise SystemExit(0)
    state = Singleton.get_state()
    due = [number for number, run in enumerate(runs) if needs_job(run, checked[number], overrides[number])]
    arguments = [(list(overrides[n]), "hydra.sweep.dir", first + n, f"job_id_for_{first + n}", state) for n in due]
    if due:
        names = submit(job, arguments, folder, parameters, [runs[n] for n in due])
        jobs = {name: runs[n] for name, n in zip(names, due, strict=True)}
        array = names[0].split("_")[0]
        follow = f"python -m dcdit.status {shlex.quote(str(sweep_dir))}"
        say(f"Submitted {', '.join(jobs)}. Follow: {follow}   End: scancel {array}")
        if not cluster.wait:
            raise SystemExit(0)
        wait_for_runs(jobs, cluster, sweep_dir.absolute())
    return [job_return(*outcome) for outcome in zip(runs, overrides, configs, strict=True)]


def config_or_error(values: DictConfig) -> TrainConfig | UserError:
    """Return a configuration that its run could begin with, or what is wrong with it, which :func:`needs_job` reports.

    Raises:
        UserError: if it is the cluster that is wrong.
    """
    plain = plain_values(TrainConfig, values)
    read_cluster(plain["cluster"])  # first, for other keys follow from these
    try:
        return check_network(match_compute(call_checked(TrainConfig, plain, "")))
    except UserError as error:
        return error


def common_cluster(checked: Sequence[TrainConfig | UserError]) -> ClusterSettings:
    """The settings that all runs of a sweep share; UserError if they do not, or if no configuration is right."""
    clusters = [cluster_of(config) for config in checked if isinstance(config, TrainConfig)]
    if not clusters:
        raise next(error for error in checked if isinstance(error, UserError))
    if any(other != clusters[0] for other in clusters):
        raise UserError("cluster.*: all runs of a sweep are one job array and need the same; submit them apart")
    return clusters[0]


def needs_job(run: Path, checked: TrainConfig | UserError, overrides: Sequence[str]) -> bool:
    """Whether the run in the directory ``run`` needs a job.

    If not, this says why, and records an error of the configuration in the directory.

    Args:
        checked: the configuration, or what is wrong with it.
        overrides: the command-line overrides that it was composed from.
    """
    name = os.path.relpath(run)
    if is_held(run):
        say(f"{name} is being trained right now: left alone")
        return False
    try:
        if isinstance(checked, UserError):
            raise checked
        before = RunState.read(run)
        if before is not None and before.settings and checkpoints_in(run / "checkpoints"):
            changes(before.settings, recorded_settings(checked), before.step, automatic=True)
    except UserError as error:
        run.mkdir(parents=True, exist_ok=True)
        note_failure(error, run, tuple(overrides), sweeping=True)
        say(f"{name}: {error}")
        return False
    if is_finished(before, checked.trainer.max_steps):
        say(f"{name} is finished: left alone")
        return False
    if (run / QUEUED_NAME).exists():
        say(f"{name} was submitted before and has not begun; of two jobs the second finds it taken")
    return True


def remove_empty_sweep(sweep_dir: Path) -> None:
    """Remove the directory that Hydra made for a sweep that is not submitted."""
    if sweep_dir.is_dir() and {path.name for path in sweep_dir.iterdir()} <= {"multirun.yaml"}:
        shutil.rmtree(sweep_dir)


def job_script(folder: Path, parameters: Mapping[str, object], jobs: int) -> str:
    """The script that sbatch would get for so many jobs."""
    executor = ScriptWriter(folder)
    executor.update_parameters(**parameters)
    if jobs > 1:
        executor.parameters["map_count"] = jobs
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(
    job: Callable[..., JobReturn],
    arguments: Sequence[tuple[object, ...]],
    folder: Path,
    parameters: Mapping[str, object],
    runs: Sequence[Path],
) -> list[str]:
    """Submit the jobs of ``runs`` to SLURM; returns their names.

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
    for run in runs:  # before a job may start and remove the note
        run.mkdir(parents=True, exist_ok=True)
        (run / QUEUED_NAME).touch()
    try:
        return [submitted.job_id for submitted in executor.map_array(job, *zip(*arguments, strict=True))]
    except (FailedJobError, OSError) as error:
        for run in runs:
            (run / QUEUED_NAME).unlink()
        raise UserError(
            f"cluster=slurm: sbatch refused the job: {str(error).strip()}\n(Is this a machine of the cluster? Else"
            " SLURM_CONF says where its slurm.conf is.)"
        ) from None


def wait_for_runs(jobs: Mapping[str, Path], cluster: ClusterSettings, sweep_dir: Path) -> None:
    """Wait until every run has finished or failed, or its job is gone; ``jobs`` has their directories by job."""
    left, missed = dict(jobs), dict.fromkeys(jobs, 0)
    while left:
        try:
            time.sleep(cluster.poll_seconds)
        except KeyboardInterrupt:
            say(f"\nThe jobs go on. Follow: python -m dcdit.status {shlex.quote(os.path.relpath(sweep_dir))}")
            raise
        queued = in_queue(next(iter(jobs)).split("_")[0])
        for name, run in list(left.items()):
            if not has_ended(run):
                missed[name] = missed[name] + 1 if queued is not None and name not in queued else 0
                if missed[name] < MISSED_POLLS:
                    continue
                note_gone(run, name)
            del left[name]
            progress = progress_of(run, str(run.relative_to(sweep_dir)) if run != sweep_dir else run.name)
            where = f"{progress.state.value} at step {progress.step}"
            say(f"{progress.name}: {where} ({len(left)} of {len(jobs)} runs left)")


def has_ended(run: Path) -> bool:
    """Whether the run has finished or failed since it was submitted."""
    state = RunState.read(run)
    return state is not None and state.state in (State.FINISHED, State.FAILED) and not (run / QUEUED_NAME).exists()


def in_queue(job: str) -> set[str] | None:
    """The names of the jobs of an array that wait or run; None if SLURM does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={job}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no foreign text
    if result.returncode == 0:
        return set(result.stdout.split())
    return set() if "Invalid job id" in result.stderr else None


def note_gone(run: Path, name: str) -> None:
    """Record that a job left the queue without an outcome; a state that the run itself has written stays."""
    (run / QUEUED_NAME).unlink(missing_ok=True)
    if RunState.read(run) is None:
        reason = f"job {name} was cancelled, or ended before the run began: look into {FOLDER} beside the runs"
        RunState(State.FAILED, reason=reason).write(run)


def job_return(run: Path, overrides: Sequence[str], config: DictConfig) -> JobReturn:
    """The outcome of a run for the sweeper: its validation loss, NaN if it failed."""
    state = RunState.read(run)
    finished = state is not None and state.state is State.FINISHED
    value = state.metrics.get("val/diffusion_loss") if finished and state else math.nan
    return JobReturn(overrides=list(overrides), cfg=config, status=JobStatus.COMPLETED, _return_value=value)
