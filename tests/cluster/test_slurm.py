"""Real jobs on a real SLURM of one node, two processes (gloo) each: a sweep, and what may happen to its jobs."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from support.configs import TINY
from support.plugins import write_router
from support.runs import assert_same_end, load, wait_for

from dcdit.runs.progress import progress_of
from dcdit.runs.state import RunState, State

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="there is no sbatch on this machine"),
    pytest.mark.skipif(
        os.name != "posix" or os.getuid() != 0 or shutil.which("slurmctld") is None,
        reason="starting a SLURM of its own needs root and slurmctld",
    ),
]

SETTINGS = (
    *TINY,
    "trainer=cpu",
    "trainer.precision=32-true",
    "cluster=slurm",
    "cluster.gpus_per_node=0",
    "cluster.tasks_per_node=2",
    "cluster.cpus_per_task=1",
    "cluster.poll_seconds=2",
    "+cluster.env.OMP_NUM_THREADS=1",
    "+cluster.env.OMP_WAIT_POLICY=passive",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A SLURM that nobody else sees; returns the environment of its users."""
    directory = tmp_path_factory.mktemp("slurm")
    script = str(ROOT / "scripts" / "local_slurm.sh")
    started = subprocess.run([script, "start", str(directory)], capture_output=True, text=True, timeout=60)
    assert started.returncode == 0, started.stderr
    yield os.environ | {"SLURM_CONF": str(directory / "slurm.conf"), "SBATCH_PARTITION": "main"}
    subprocess.run([script, "stop", str(directory)], check=True, timeout=60)


def submit(tmp_path, digits, slurm, *overrides) -> subprocess.Popen:
    line = [sys.executable, "-m", "dcdit.train", "-m", *SETTINGS, f"data.directory={digits}", *overrides]
    log = (tmp_path / "launcher.log").open("w")
    return subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, env=slurm)


def summary(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "summary.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def ask(slurm, *line: str) -> str:
    return subprocess.run(line, env=slurm, capture_output=True, text=True, timeout=60).stdout


def release(slurm) -> None:
    """SLURM holds a job that was queued again back for two minutes; let it wait for a few seconds alone."""
    for line in ask(slurm, "squeue", "--noheader", "--states=PD", "--format=%A %S %r").splitlines():
        job, begin, reason = line.split(maxsplit=2)
        if (
            reason == "BeginTime"
            and begin != "N/A"
            and datetime.fromisoformat(begin) > datetime.now() + timedelta(seconds=10)
        ):
            ask(slurm, "scontrol", "update", f"jobid={job}", "starttime=now+5")
    time.sleep(0.5)


def test_a_sweep_is_one_job_array_and_is_summed_up(tmp_path, digits, slurm):
    """A plug-in takes part: both processes of each job have to import it, and to find its configuration file."""
    write_router(tmp_path, "my_router", "own")
    (tmp_path / "configs" / "multi_budget").mkdir(parents=True)
    (tmp_path / "configs" / "multi_budget" / "mine.yaml").write_text("defaults: [wide, _self_]\n")
    own = ("plugins=[my_router]", "model.router=own", "multi_budget=mine")
    varied = (*own, "compression=2,4", "trainer.max_steps=6", "trainer.val_check_interval=3")
    process = submit(tmp_path, digits, slurm, *varied)
    folder = tmp_path / "runs" / "digits_sweep"
    text = tmp_path / "launcher.log"
    wait_for(lambda: "Submitted" in text.read_text() or process.poll() is not None)
    states = {progress_of(path, "").state.value for path in folder.glob("compression_*")}
    assert states <= {"queued", "running", "finished"}
    assert process.wait(300) == 0, text.read_text()
    names = {f"compression_{n}" for n in (2, 4)}
    rows = summary(folder)
    assert set(rows) == names
    assert len(list((folder / ".submitit").glob("*_submission.sh"))) == 1
    script = next((folder / ".submitit").glob("*_submission.sh")).read_text()
    assert "--array=0-1" in script
    for name, row in rows.items():
        assert (row["state"], row["step"]) == ("finished", "6")
        last = RunState.read(folder / name).metrics
        assert float(row["val/diffusion_loss"]) == pytest.approx(last["val/diffusion_loss"])
        # two processes, which kept different numbers of tokens
        assert float(row["train/tokens_per_rank_min"]) <= float(row["train/tokens_per_rank"])
        assert float(row["train/tokens_per_rank"]) <= float(row["train/tokens_per_rank_max"])
        assert load(folder / name)["global_step"] == 6
        assert "on 2 processes" in (folder / name / "job.log").read_text()
        assert "cluster" not in (folder / name / "config.yaml").read_text()
    losses = {(row["val/diffusion_loss"], row["train/ratio_loss"]) for row in rows.values()}
    assert len(losses) == 2
    assert "2 runs: " in text.read_text()


def test_disturbed_jobs_end_as_the_undisturbed_and_a_broken_one_fails_once(tmp_path, digits, slurm):
    settings = ("trainer.max_steps=200", "callbacks.checkpoint.every_n_steps=20", "multi_budget.full_budget_steps=20")
    names = {"undisturbed": 100, "requeued": 101, "preempted": 102, "killed": 103, "broken": -1}
    # a value that changes nothing tells the runs apart
    varied = f"data.corrupt_limit={','.join(map(str, names.values()))}"
    process = submit(tmp_path, digits, slurm, *settings, varied, "run_name=disturbed")
    folder = tmp_path / "runs" / "disturbed_sweep"
    runs = {name: folder / f"data.corrupt_limit_{value}" for name, value in names.items()}
    text = tmp_path / "launcher.log"
    wait_for(lambda: "Submitted" in text.read_text() or process.poll() is not None)
    array = text.read_text().split("Submitted ")[1].split("_")[0]
    jobs = {name: f"{array}_{number}" for number, name in enumerate(names)}

    def disturb(name: str) -> None:
        wait_for(lambda: list((runs[name] / "checkpoints").glob("step_*.ckpt")), 200)
        assert progress_of(runs[name], "").state is State.RUNNING
        if name == "requeued":
            ask(slurm, "scontrol", "requeue", jobs[name])
        elif name == "preempted":  # as submitit's own test of preemption does
            for each in ("TERM", "USR2"):
                ask(slurm, "scancel", f"--signal={each}", jobs[name])
        else:
            os.kill(process_of(runs[name]), signal.SIGKILL)

    for name in ("killed", "requeued", "preempted"):
        disturb(name)

    def over() -> bool:
        release(slurm)
        return process.poll() is not None

    wait_for(over, 400)
    rows = {name: summary(folder)[run.name] for name, run in runs.items()}
    broken = rows.pop("broken")
    assert (broken["state"], broken["reason"][:33]) == ("failed", "data.corrupt_limit=-1 is negative")
    assert starts(runs["broken"]) == 1
    assert process.returncode == 1  # for the broken one
    for name, row in rows.items():
        assert (row["state"], row["step"], row["reason"]) == ("finished", "200", ""), (name, row)
        assert starts(runs[name]) == (1 if name == "undisturbed" else 2)
        assert_same_end(runs["undisturbed"], runs[name])
    # what was signalled saved at once; what was killed went on from an earlier checkpoint
    assert "finishing this step and saving" in (runs["preempted"] / "job.log").read_text()
    assert not list((folder / ".submitit").glob("*.unfinished"))
    assert not list(folder.glob("*/.queued"))


def process_of(run: Path) -> int:
    """A process of the job that runs in ``run``: the one that holds its directory."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(file) == str(run / ".running.lock") for file in (place / "fd").iterdir()):
                return int(place.name)
        except OSError:
            continue
    raise AssertionError(f"nobody trains in {run}")


def starts(run: Path) -> int:
    return (run / "job.log").read_text().count("Starting with JobEnvironment")


def test_a_run_that_dies_again_and_again_is_given_up(tmp_path, digits, slurm):
    # every start is killed before its first checkpoint
    endless = ("trainer.max_steps=1000000", "callbacks.checkpoint.every_n_steps=1000000")
    process = submit(tmp_path, digits, slurm, *endless, "cluster.max_restarts=0", "run_name=dying")
    run = tmp_path / "runs" / "dying"

    def next_step() -> bool:
        release(slurm)
        if starts_so_far() == 1 and progress_of(run, "").step > 3 and progress_of(run, "").state is State.RUNNING:
            os.kill(process_of(run), signal.SIGKILL)
            wait_for(lambda: progress_of(run, "").state is not State.RUNNING)
        return process.poll() is not None

    def starts_so_far() -> int:
        return starts(run) if (run / "job.log").exists() else 0

    wait_for(next_step, 400)
    assert process.returncode == 1, (run / "job.log").read_text()
    assert starts(run) == 2
    state = RunState.read(run)
    assert state.state is State.FAILED
    assert "cluster.max_restarts=0: the run died 1 times in a row after step 0" in state.reason
    wait_for(lambda: ask(slurm, "squeue", "--noheader") == "")
