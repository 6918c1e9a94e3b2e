"""The ``cluster`` group of the configuration, and the parameters for sbatch that follow from it."""

import re
import shlex
from pathlib import Path
from typing import Any

from dcdit.checks import Count, Natural, Positive, call_checked, config
from dcdit.cluster.job import MARK
from dcdit.errors import UserError
from dcdit.training.batching import accumulation
from dcdit.training.settings import TrainConfig

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@config
class ClusterSettings:
    """The ``cluster`` section; ``configs/cluster/slurm.yaml`` describes each key."""

    name: str
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    timeout_min: Count
    nodes: Count
    gpus_per_node: Natural
    tasks_per_node: Count
    cpus_per_task: Count | None
    mem_gb: Positive | None
    setup: list[str]
    env: dict[str, Any]
    additional_parameters: dict[str, Any]
    array_parallelism: Count
    signal_delay_s: Count
    max_restarts: Natural
    wait: bool
    poll_seconds: Positive
    dry_run: bool

    def __post_init__(self) -> None:
        if self.timeout_min * 60 <= self.signal_delay_s:
            raise UserError(
                f"signal_delay_s={self.signal_delay_s}: a job of timeout_min={self.timeout_min} is over before it is"
                " told to save"
            )
        for name, value in self.env.items():
            if _SECRET.search(name):
                raise UserError(
                    f"env.{name}: looks like a secret, which would be saved with the run. Set it in the shell that"
                    " submits (export ...): SLURM hands the shell's environment on to the job"
                )
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or isinstance(value, dict | list):
                raise UserError(f"env.{name}={value!r} is no variable of a shell")


def read_cluster(section: Any) -> ClusterSettings:
    """The checked section ``cluster`` of plain values; UserError if a value is wrong."""
    return call_checked(ClusterSettings, section, "cluster")


def cluster_of(config: TrainConfig) -> ClusterSettings:
    """The checked ``cluster`` of a configuration that runs on SLURM.

    Raises:
        UserError: if a value is wrong, or the trainer would use other processes than the job has.
    """
    cluster, trainer = read_cluster(config.cluster), config.trainer
    for key, value, name in (
        ("devices", trainer.devices, "tasks_per_node"),
        ("num_nodes", trainer.num_nodes, "nodes"),
    ):
        if value != getattr(cluster, name):
            raise UserError(
                f"trainer.{key}={value} disagrees with cluster.{name}={getattr(cluster, name)}: leave trainer.{key}"
                f" out, it follows cluster.{name}"
            )
    if trainer.on_gpu and cluster.gpus_per_node != cluster.tasks_per_node:
        raise UserError(
            f"cluster.tasks_per_node={cluster.tasks_per_node} disagrees with cluster.gpus_per_node="
            f"{cluster.gpus_per_node}: trainer.accelerator={trainer.accelerator} takes one process for each GPU"
        )
    if trainer.accelerator == "cpu" and cluster.gpus_per_node:
        raise UserError(
            f"cluster.gpus_per_node={cluster.gpus_per_node}, but trainer.accelerator=cpu would leave them idle: set"
            " cluster.gpus_per_node=0 and cluster.tasks_per_node to the processes of a node, or take trainer=gpu"
        )
    accumulation(config, cluster.nodes * cluster.tasks_per_node)
    return cluster


def sbatch_parameters(cluster: ClusterSettings, name: str, folder: Path) -> dict[str, object]:
    """The parameters of the job ``name`` for submitit's SLURM executor, which writes its script into ``folder``."""
    variables = [f"export {key}={shlex.quote(str(value))}" for key, value in cluster.env.items()]
    # SLURM since 22.05 does not hand the cores of a task on from sbatch to srun.
    cores = [] if cluster.cpus_per_task is None else [f"--cpus-per-task={cluster.cpus_per_task}"]
    of_the_same_name = ("partition", "account", "qos", "constraint", "nodes", "cpus_per_task")
    values = {
        **{key: getattr(cluster, key) for key in (*of_the_same_name, "signal_delay_s", "array_parallelism")},
        "job_name": name,
        "time": cluster.timeout_min,
        "ntasks_per_node": cluster.tasks_per_node,
        "gpus_per_node": None if "gres" in cluster.additional_parameters else cluster.gpus_per_node or None,
        "mem": None if cluster.mem_gb is None else f"{round(cluster.mem_gb * 1024)}M",
        "stderr_to_stdout": True,
        "setup": [*variables, *cluster.setup] or None,
        "teardown": requeue_lines(folder),
        # When a process dies the others end as well: they would wait for it in vain.
        "srun_args": ["--kill-on-bad-exit=1", *cores],
        "additional_parameters": {"requeue": True, **cluster.additional_parameters},
    }
    # submitit's default for the accounting key is of no use here.
    return {key: value for key, value in values.items() if value is not None} | {"wckey": None}


def requeue_lines(folder: Path) -> list[str]:
    """Lines of shell at the end of a job's script, which queue the job again if its run is unfinished.

    Nothing else does so. The mark is there from the start of a run until it has finished or failed for reasons of its
    own (:mod:`dcdit.cluster.job`). A node that dies, ``scontrol requeue`` and SLURM's preemption end the script itself;
    then SLURM queues the job again, as the option ``--requeue`` asks for.
    """
    mark = f'{shlex.quote(str(folder))}/"$SLURM_JOB_ID"{MARK}'
    return [
        "status=$?",
        # The last job of an array has the number of the array itself, which means all of them to SLURM.
        'job="$SLURM_JOB_ID"',
        '[ -z "$SLURM_ARRAY_JOB_ID" ] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        f'if [ -e {mark} ] && [ "$(squeue --noheader --format=%T --jobs="$job")" = RUNNING ]; then',
        '    echo "The job ended in the middle, with exit status $status: queued again"',
        f'    touch "$(cat {mark})/.queued"',
        '    scontrol requeue "$job"',
        "    sleep 60",
        "fi",
        "exit $status",
    ]
