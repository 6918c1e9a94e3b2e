"""Sweeps, the state of runs on disk, and what two commands in one directory do."""

import csv
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.commands import typed
from support.configs import TINY, call, compose_config, train
from support.processes import run as run_command
from support.runs import load, start, wait_for

from dcdit import status
from dcdit.errors import UserError
from dcdit.runs.lock import is_held, sole_writer
from dcdit.runs.progress import progress_of, runs_below
from dcdit.runs.state import RunState, State
from dcdit.runs.sweep import constant_keys


def sweep(tmp_path, digits, *overrides):
    settings = [word for word in TINY if word != "callbacks.progress=null"]
    words = ("-m", *settings, "callbacks.progress=null", f"data.directory={digits}", *overrides)
    return run_command(tmp_path, "train", *words)


def test_a_failed_run_leaves_the_others_unharmed_and_has_its_reason(tmp_path, digits):
    varied = ("trainer.max_steps=4", "trainer.val_check_interval=2", "compression=4,0.5", "seed=0,1")
    result = sweep(tmp_path, digits, *varied, "multi_budget.full_budget_steps=0")
    assert result.poll() == 1, result.said
    folder = tmp_path / "runs" / "digits_sweep"
    runs = {path.name for path in folder.iterdir() if path.is_dir()}
    # named by what varies, and by nothing else
    assert runs == {f"compression_{n}__seed_{seed}" for n in ("4", "0.5") for seed in (0, 1)}
    with (folder / "summary.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert set(rows) == runs
    for name, row in rows.items():
        if "0.5" in name:
            assert (row["state"], row["step"]) == ("failed", "0")
            assert "compression=0.5 must be greater than 1" in row["reason"]
            assert not (folder / name / "checkpoints").exists()
        else:
            assert (row["state"], row["step"], row["reason"]) == ("finished", "4", "")
            assert float(row["val/diffusion_loss"]) > 0
            assert load(folder / name)["global_step"] == 4
    assert "4 runs, 2 of them not finished" in result.out
    # the same again: what is finished stays as it is, directories are the same
    before = {path: path.read_bytes() for path in folder.rglob("last.ckpt")}
    again = sweep(
        tmp_path, digits, *varied[:2], "compression=4", "seed=0,1", "multi_budget.full_budget_steps=0", "ckpt_path=auto"
    )
    assert again.poll() == 1  # the failed ones are still there
    assert (folder / "seed_0").is_dir()  # another sweep: compression does not vary in it
    assert {path: path.read_bytes() for path in before} == before


def test_what_varies():
    words = ["experiment=b_n4", "compression=2,4", "model.depth=choice(2,3)", "~callbacks.ema", "data.x=[1,2]"]
    assert constant_keys(words) == ["experiment", "callbacks.ema", "data.x"]


def test_a_finished_run_says_so(tiny, capsys, caplog):
    run = tiny("run", "trainer.max_steps=3")
    before = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    tiny("run", "trainer.max_steps=3", "ckpt_path=auto")
    assert "is finished, at step 3: train on with a larger trainer.max_steps" in caplog.text
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    tiny("run", "trainer.max_steps=5", "ckpt_path=auto")
    assert load(run)["global_step"] == 5


def test_two_commands_cannot_write_one_run(tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with sole_writer(run, 0):
        assert is_held(run)
        with pytest.raises(UserError, match="another process is training there"):
            tiny("run", "trainer.max_steps=2")
        with sole_writer(run, 1):  # the other processes of the same run
            pass
    assert not is_held(run)
    tiny("run", "trainer.max_steps=2")


def test_the_state_of_runs(tiny, tmp_path, capsys):
    finished = tiny("finished", "trainer.max_steps=3")
    tiny("died", "trainer.max_steps=3")
    state = RunState.read(tmp_path / "died")
    replace(state, state=State.RUNNING, max_steps=1000).write(tmp_path / "died")
    found = {
        each.name.rsplit("/", 1)[-1]: each for each in call(status, compose_config(f"runs=[{tmp_path}]", name="status"))
    }
    assert (found["finished"].state.value, found["finished"].step, found["finished"].max_steps) == ("finished", 3, 3)
    assert found["finished"].loss > 0
    assert found["finished"].seconds_left is None
    assert found["died"].state is State.LOST
    with sole_writer(tmp_path / "died", 0):
        running = progress_of(tmp_path / "died", "died")
    assert running.state == "running"
    assert running.seconds_left == pytest.approx((1000 - 3) * 8 / running.rate)
    shown = capsys.readouterr().out
    assert "finished" in shown
    assert runs_below(tmp_path) == [tmp_path / "died", finished]
    with pytest.raises(UserError, match="no runs there"):
        call(status, compose_config(f"runs=[{tmp_path}/finished/checkpoints]", name="status"))
    with pytest.raises(UserError, match="is no directory"):
        call(status, compose_config("runs=[nowhere]", name="status"))


def test_the_state_of_runs_in_a_narrow_terminal(trained_run, capsys, monkeypatch):
    for columns, is_table in (("80", True), ("40", False), ("10", False)):
        monkeypatch.setenv("COLUMNS", columns)
        call(status, compose_config(f"runs=[{trained_run}]", name="status"))
        shown = capsys.readouterr().out
        assert ("┃" in shown) == is_table
        if not is_table:
            assert f"{trained_run}: state finished, step 3 of 3, diffusion loss " in shown


def test_sigterm_saves_and_the_run_goes_on(tmp_path, digits):
    run = tmp_path / "run"
    settings = ("trainer.max_steps=2000", "callbacks.checkpoint.every_n_steps=1000")
    process = start(run, digits, *settings)
    wait_for(lambda: progress_of(run, "").step > 5 or process.poll() is not None)
    assert progress_of(run, "").state == "running"
    os.kill(process.pid, signal.SIGTERM)
    process.wait(60)
    text = process.said
    assert "SIGTERM: finishing this step and saving" in text
    assert "Resume: python -m dcdit.train resume=run\n" in text
    state = RunState.read(run)
    assert (state.state, state.step) == ("interrupted", load(run)["global_step"])
    assert 5 < state.step < 2000
    (tmp_path / "again").mkdir()
    overrides = (
        f"data.directory={digits}",
        f"ckpt_path={run}/checkpoints/last.ckpt",
        f"trainer.max_steps={state.step + 2}",
    )
    train(compose_config(*TINY, *overrides), tmp_path / "again")
    assert load(tmp_path / "again")["global_step"] == state.step + 2


def test_a_signal_in_the_last_step_interrupts_nothing(tiny, monkeypatch):
    from dcdit.training.callbacks.interrupt import StopOnInterrupt

    handle = StopOnInterrupt.on_train_batch_end

    def signalled(self, trainer, *arguments):
        self.signalled = trainer.global_step == 3
        handle(self, trainer, *arguments)

    monkeypatch.setattr(StopOnInterrupt, "on_train_batch_end", signalled)
    assert RunState.read(tiny("last", "trainer.max_steps=3")).state == "finished"
    assert RunState.read(tiny("before", "trainer.max_steps=4")).state == "interrupted"


def test_old_checkpoints_go_and_milestones_stay(tiny):
    settings = ("callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=2")
    run = tiny("run", "trainer.max_steps=13", *settings, "callbacks.checkpoint.milestone_every=4")
    steps = sorted(int(path.stem[5:]) for path in (run / "checkpoints").glob("step_*.ckpt"))
    assert steps == [4, 8, 12, 13]
    assert load(run)["global_step"] == 13
    with pytest.raises(Exception, match="keep=0 is not a positive number"):
        tiny("wrong", "callbacks.checkpoint.keep=0")


def test_a_link_that_leads_nowhere_is_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    monkeypatch.setenv("DCDIT_RUNS", str(tmp_path / "runs"))
    result = typed(capsys, tmp_path, "train", *TINY)
    assert result.status == 2
    # a path that is longer than a line of the frame is broken, so that spaces are not compared
    message = re.sub(r"\s", "", result.words)
    assert re.search("runsisasymboliclinkto.*gone,whichdoesnotexist:makethat,orname", message)


def test_a_refused_command_leaves_nothing(tmp_path, capsys):
    result = typed(capsys, tmp_path, "train", *TINY, "run_name=wrong", "compression=0.5")
    assert result.status == 2
    assert not (tmp_path / "runs" / "wrong").exists()


def test_a_stopped_run_is_marked(tiny, tmp_path):
    from dcdit.runs.failure import note_failure

    run = tiny("run", "trainer.max_steps=2")
    note_failure(RuntimeError("no"), run, (), sweeping=True)
    assert RunState.read(run).state == "finished"  # not touched by the command that failed
    RunState(State.RUNNING, max_steps=5, time=time.time()).write(run)
    note_failure(RuntimeError("out of memory\nmore"), run, (), sweeping=False)
    state = RunState.read(run)
    assert (state.state, state.reason) == ("failed", "RuntimeError: out of memory")
    assert torch.isfinite(torch.tensor(state.time))


def test_a_resumed_run_keeps_its_curves_at_wandb(tiny):
    words = ("logger=wandb", "logger.wandb.mode=offline")
    run = tiny("run", *words, "trainer.max_steps=2")
    tiny("run", *words, "trainer.max_steps=4", "ckpt_path=last")
    other = tiny("other", *words, "trainer.max_steps=2")
    ids = [path.name.rpartition("-")[2] for path in sorted((run / "wandb").glob("offline-run-*"))]
    assert set(ids) == {RunState.read(run).id}  # starts within one second share a directory
    assert {path.name.rpartition("-")[2] for path in (other / "wandb").glob("offline-run-*")} == {
        RunState.read(other).id
    }
    assert RunState.read(other).id != ids[0]  # of the same name, in another directory
    assert "WANDB_MODE" not in os.environ  # another run of this process may be online


def test_what_wandb_is_told(tiny, monkeypatch):
    """The keys of the configuration as wandb's own arguments, the pictures of a validation, and no secret."""
    import wandb

    told, pictures, init, image = {}, {}, wandb.init, wandb.Image
    monkeypatch.setattr(wandb, "init", lambda **named: told.update(named) or init(**named))
    monkeypatch.setattr(
        wandb, "Image", lambda path, **named: pictures.update({Path(path).name: named}) or image(path, **named)
    )
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    keys = {"project": "routers", "entity": "me", "group": "a", "notes": "without smoothing", "mode": "offline"}
    fid = ("callbacks=fid", "features@callbacks.fid.features=digits", "callbacks.fid.count=40", "callbacks.fid.shown=3")
    steps = ("trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks.fid.sampler.steps=2")
    words = [f"logger.wandb.{key}={value}" for key, value in keys.items()]
    run = tiny("run", "logger=wandb", *words, "logger.wandb.tags=[b,c]", *fid, *steps)
    assert {key: told[key] for key in keys} == keys
    assert (told["tags"], told["id"], told["dir"]) == (["b", "c"], RunState.read(run).id, str(run))
    assert set(pictures) == {"step_00000002_samples.png", "step_00000002_boundaries.png"}
    captions = {named["caption"] for named in pictures.values()}
    assert captions == {"0, 1, 2; drop fractions 0, 0.3"}
    stored = [path.name for path in (run / "wandb").rglob("*.png")]
    assert len(stored) == 2
    texts = [path for path in run.rglob("*") if path.is_file() and path.suffix in (".json", ".yaml", ".csv", ".wandb")]
    assert not [path for path in texts if b"0123456789" * 4 in path.read_bytes()]
