"""What goes to SLURM, what is refused before, and several processes without it."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import typed
from support.configs import PLAIN_DIT, TINY, compose_config, config_of
from support.processes import Command, end, ranks, run
from support.runs import assert_same_end, load, wait_for

from dcdit.errors import UserError
from dcdit.runs.progress import progress_of
from dcdit.runs.state import RunState, State
from dcdit.runtime.processes import lost_process
from dcdit.settings.compose import configuration_of
from dcdit.training.batching import accumulation, describe_split, world_size
from dcdit.training.build import build_trainer
from dcdit.training.callbacks.interrupt import StopOnInterrupt
from dcdit.training.settings import TrainConfig

pytest.importorskip("submitit", reason="the extra slurm is not installed")
from dcdit.cluster.settings import cluster_of

CPU = ("trainer=cpu", "cluster=slurm", "cluster.gpus_per_node=0", "cluster.tasks_per_node=2")


def command(tmp_path: Path, *overrides: str) -> Command:
    # no SLURM in sight, whatever this machine has
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "srun").exists())
    return run(tmp_path, "train", *overrides, PATH=path)


def test_the_script_is_shown_without_a_slurm(tmp_path):
    settings = (
        "experiment=b_n4",
        "cluster=slurm_multinode",
        "cluster.nodes=4",
        "cluster.timeout_min=720",
        "compression=2,4",
    )
    more = ("cluster.constraint=a100", "cluster.setup=[module load cuda]", "+cluster.env.NCCL_DEBUG=a b")
    result = command(tmp_path, *settings, *more, "cluster.dry_run=true")
    assert result.poll() == 0, result.said
    lines = result.out.splitlines()
    wanted = (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=8",
        "--time=720",
        "--constraint=a100",
        "--array=0-1%2",
        "--signal=USR2@120",
        "--exclusive",
        "--requeue",
    )
    for option in wanted:
        assert f"#SBATCH {option}" in lines
    assert "module load cuda" in lines
    assert "export NCCL_DEBUG='a b'" in lines
    assert not any("account" in line or "partition" in line for line in lines)  # left to the environment
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.devices=4",), "trainer.devices=4 disagrees with cluster.tasks_per_node=2"),
        (("trainer.num_nodes=3",), "trainer.num_nodes=3 disagrees with cluster.nodes=1"),
        (("cluster.gpus_per_node=2",), "cluster.gpus_per_node=2, but trainer.accelerator=cpu"),
        (("trainer=gpu", "cluster.gpus_per_node=1"), "cluster.tasks_per_node=2 disagrees with cluster.gpus_per_node=1"),
        (("data.batch_size=7",), "data.batch_size=7 cannot be split over 2 processes"),
        (("+cluster.env.WANDB_API_KEY=1",), "cluster.env.WANDB_API_KEY: looks like a secret"),
        (("cluster.timeout_min=0",), "cluster.timeout_min=0 is not a positive number"),
        (("cluster.timeout_min=2",), "cluster.signal_delay_s=120: a job of timeout_min=2 is over before"),
        (("cluster.nodes=two",), "nodes='two' is not a whole number"),
    ],
)
def test_disagreements_are_found_before_anything_is_submitted(overrides, message):
    with pytest.raises(UserError) as caught:
        cluster_of(config_of("experiment=digits", *CPU, *overrides))
    assert message in str(caught.value)


def test_a_refused_submission_is_one_message(tmp_path):
    result = command(tmp_path, "-m", *TINY, *CPU, "seed=0,1")
    assert result.poll() == 2
    assert "there is no SLURM on this machine" in result.words
    assert "Traceback" not in result.said
    mistyped = command(tmp_path, *TINY, *CPU, "cluster.env.A=1")
    assert "+cluster.env.A" in mistyped.words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.router=cosin",), "model.router='cosin' is not one of predictability, cosine: did you mean cosine?"),
        (("model.name=dcdt",), "model.name='dcdt' is not one of"),
        (("model.heads=4,5",), "heads=5 does not divide width=32"),  # the second run of two
        (("execution.capacity=0.5", *PLAIN_DIT), "execution.capacity=0.5: DiT/2 drops no tokens"),
    ],
)
def test_a_dry_run_refuses_what_a_job_would_fail_with(tmp_path, capsys, words, message):
    result = typed(capsys, tmp_path, "train", *TINY, *CPU, "cluster.dry_run=true", *words)
    assert result.status == 2
    assert message in result.words
    assert "#SBATCH" not in result.out
    assert not list(tmp_path.rglob("*.*"))


def test_the_trainer_follows_the_cluster():
    config = compose_config("experiment=xl_n4", "cluster=slurm_multinode", "cluster.nodes=3", "cluster.gpus_per_node=4")
    assert (config.trainer.devices, config.trainer.num_nodes, config.ckpt_path) == (4, 3, "auto")
    assert world_size(configuration_of(TrainConfig, config)) == 12
    cluster_of(config_of("experiment=xl_n4", "cluster=slurm", "cluster.gpus_per_node=2"))


@pytest.mark.parametrize(
    ("batch", "world", "most", "steps"),
    [(256, 8, None, 1), (256, 8, 8, 4), (256, 8, 32, 1), (60, 2, 7, 5), (6, 2, 1, 3)],
)
def test_the_batch_stays_what_it_is(batch, world, most, steps):
    given = f"execution.max_micro_batch={'null' if most is None else most}"
    plan = config_of("experiment=digits", f"data.batch_size={batch}", given)
    assert accumulation(plan, world) == steps
    assert batch % (world * steps) == 0


@cache
def digits_config():
    return config_of("experiment=digits")


@settings(deadline=None)
@given(batch=st.integers(1, 400), most=st.integers(1, 400))
def test_micro_batches_are_near_what_was_asked_for_or_refused_with_sizes_that_work(batch, most):
    execution = replace(digits_config().execution, max_micro_batch=most)
    plan = replace(digits_config(), execution=execution, data={"batch_size": batch})
    divisors = [size for size in range(1, batch + 1) if batch % size == 0]
    largest = max(size for size in divisors if size <= most)
    if 2 * largest >= min(most, batch):
        assert accumulation(plan, 1) == batch // largest
        return
    with pytest.raises(UserError, match="nearest sizes of micro-batches that divide") as caught:
        accumulation(plan, 1)
    for size in (largest, min(size for size in divisors if size > most)):
        assert re.search(rf" {size}\b", str(caught.value))
        better = replace(plan, execution=replace(execution, max_micro_batch=size))
        assert accumulation(better, 1) == batch // size


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), ""),
        (("execution.max_micro_batch=24",), "Micro-batches of 16 samples, 4 a step"),
        (("trainer.devices=2",), ""),
        (("trainer.devices=2", "execution.max_micro_batch=16"), "Micro-batches of 16 samples, 2 a step, on each of 2"),
        (("execution.max_micro_batch=8",), "8 a step; so split, ratio.group=16 makes other groups"),
        (("execution.max_micro_batch=16", "ratio.group=null"), "4 a step; so split, ratio.group=null makes other"),
        (("trainer.devices=2", "data.batch_size=60"), "Parts of 30 samples, on each of 2 processes; so split, ratio"),
        (("data.batch_size=60",), ""),
    ],
)
def test_a_split_is_told_with_what_it_changes(overrides, words):
    config = config_of("experiment=digits", *overrides)
    told = describe_split(config, routes=True)
    assert words in told
    assert bool(told) == bool(words)
    assert ("other groups" in told) == ("other" in words or "so split" in words)
    assert "group" not in describe_split(config, routes=False)


def test_impossible_splits_are_refused():
    plan = config_of("experiment=digits", "data.batch_size=10", "execution.max_micro_batch=2")
    with pytest.raises(UserError, match=r"data\.batch_size=10 cannot be split over 4 processes"):
        accumulation(plan, 4)
    both = config_of("experiment=digits", "execution.max_micro_batch=2", "trainer.accumulate_grad_batches=2")
    with pytest.raises(UserError, match="two ways to say"):
        accumulation(both, 1)
    with pytest.raises(UserError, match=r"max_micro_batch=0 is not a positive number"):
        config_of("experiment=digits", "execution.max_micro_batch=0")


def test_validations_are_counted_in_optimiser_steps(tiny):
    config = compose_config(*TINY, "execution.max_micro_batch=2", "trainer.val_check_interval=3")
    trainer = build_trainer(configuration_of(TrainConfig, config), StopOnInterrupt())
    assert (trainer.accumulate_grad_batches, trainer.val_check_interval) == (4, 12)
    run = tiny("run", "execution.max_micro_batch=4", "trainer.max_steps=4", "trainer.val_check_interval=2")
    assert load(run)["global_step"] == 4
    rows = (run / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    place = rows[0].split(",").index("val/diffusion_loss")
    assert sum(bool(row.split(",")[place]) for row in rows[1:]) == 2


def test_sweeps_on_one_machine_are_one_process_each(tmp_path, digits):
    settings = (*TINY, "trainer.devices=2", f"data.directory={digits}", "seed=0,1")
    result = command(tmp_path, "-m", *settings)
    assert result.poll() == 1
    assert "runs of a sweep on this machine are one process each" in result.out
    assert "failed" in result.out


def test_torchrun_with_another_number_of_processes_is_refused(tmp_path, digits):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    line = [*torchrun, "-m", "dcdit.train", *TINY, f"data.directory={digits}"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode != 0
    assert "but 2 processes were started" in " ".join(result.stderr.replace("│", " ").split())


def test_a_signal_to_one_of_two_processes_stops_both_and_the_run_goes_on(tmp_path, digits):
    settings = (*TINY, f"data.directory={digits}", "trainer.devices=2", "trainer.precision=32-true", "ckpt_path=auto")
    more = ("optimizer.schedule=constant", "callbacks.checkpoint.every_n_steps=100000")
    words = (*settings, *more)
    run = tmp_path / "run"
    both = ranks(2, tmp_path, "train", *words, f"run_dir={run}", "trainer.max_steps=100000")
    wait_for(lambda: progress_of(run, "").step > 2 or both[0].poll() is not None)
    os.kill(both[1].pid, signal.SIGUSR2)
    end(both)
    state = RunState.read(run)
    assert (state.state, state.step) == ("interrupted", load(run)["global_step"])
    assert state.step > 2
    assert state.step % 5 == 0  # they agree every so often
    for place in (run, tmp_path / "undisturbed"):
        end(ranks(2, tmp_path, "train", *words, f"run_dir={place}", f"trainer.max_steps={state.step + 10}"))
    assert_same_end(run, tmp_path / "undisturbed")
    assert RunState.read(run).id == state.id


def test_a_run_that_died_in_place_too_often_is_given_up_by_jobs_alone(tmp_path, monkeypatch):
    from dcdit.runs.resume import state_at_start

    state = state_at_start(None, tmp_path, 10, max_restarts=1)
    assert (state.state, state.starts, state.began) == (State.RUNNING, 1, 0)
    state = state_at_start(state, tmp_path, 10, max_restarts=1)
    assert state.starts == 2
    with pytest.raises(UserError, match=r"cluster\.max_restarts=1: the run died 2 times in a row after step 0"):
        state_at_start(state, tmp_path, 10, max_restarts=1)
    with monkeypatch.context() as patch:  # may read what the first process wrote just now
        patch.setenv("LOCAL_RANK", "1")
        state_at_start(state, tmp_path, 10, max_restarts=1)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000020.ckpt").touch()  # further than before
    assert state_at_start(state, tmp_path, 10, max_restarts=1).starts == 1
    for _ in range(5):
        state = state_at_start(state, tmp_path, 10)


def test_the_end_of_another_process_is_no_reason():
    assert lost_process(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert lost_process(torch.distributed.DistNetworkError("timed out"))
    assert not lost_process(RuntimeError("CUDA out of memory"))
    assert not lost_process(RuntimeError("ProcessGroupGloo::allgather: invalid tensor size at index 0"))
    assert not lost_process(UserError("data.directory=x: no gloo there"))


def test_an_exit_while_waiting_for_the_directory(tmp_path, tiny):
    from dcdit.runs.lock import sole_writer

    run = tmp_path / "run"
    run.mkdir()
    with sole_writer(run, 0):
        begin = time.monotonic()
        with pytest.raises(UserError, match="another process is training there"), sole_writer(run, 0, patience=0.3):
            pass
        assert time.monotonic() - begin >= 0.3


def test_auto_does_not_go_on_with_another_experiment(tiny):
    run = tiny("run", "trainer.max_steps=2", "compression=4")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    for change in ("compression=8", "seed=1", "model.init=paper", "optimizer.lr=0.5"):
        with pytest.raises(UserError, match=rf"{change.split('=')[0]}=.*was trained with"):
            tiny("run", "trainer.max_steps=4", change, "ckpt_path=auto")
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    tiny("run", "trainer.max_steps=3", "compression=4", "ckpt_path=auto")
    tiny("run", "trainer.max_steps=4", "compression=8", "ckpt_path=last")  # who says so means it
    assert load(run)["global_step"] == 4


def test_only_runs_that_need_a_job_get_one(tiny, tmp_path, monkeypatch, caplog):
    from dcdit.cluster.launch import config_or_error, needs_job, note_gone
    from dcdit.runs.lock import sole_writer
    from dcdit.runs.state import QUEUED_NAME

    finished = tiny("finished", "trainer.max_steps=2")

    def due(run, *overrides):
        return needs_job(
            run, config_or_error(compose_config(*TINY, *CPU, "trainer.max_steps=2", *overrides)), overrides
        )

    assert not due(finished)
    assert due(finished, "trainer.max_steps=3")
    assert not due(finished, "trainer.max_steps=3", "compression=3")  # another experiment
    new = tmp_path / "new"
    assert due(new)
    with sole_writer(finished, 0):
        assert not due(finished, "trainer.max_steps=3")
    assert not due(tmp_path / "wrong", "model.heads=5")
    state = RunState.read(tmp_path / "wrong")
    assert state.state is State.FAILED
    assert "heads=5 does not divide width=32" in state.reason
    # a job that is gone without a word
    new.mkdir()
    (new / QUEUED_NAME).touch()
    assert progress_of(new, "").state == "queued"
    note_gone(new, "1_0")
    assert progress_of(new, "").reason.startswith("job 1_0 was cancelled")
    note_gone(finished, "1_1")
    assert RunState.read(finished).state == "finished"
