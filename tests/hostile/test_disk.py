"""Disks that are full or read-only, and writers that die or meet."""

import json
import os
import shutil
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.configs import call, compose_config
from support.damage import damaged, damages, nothing_outside

from dcdit import generate, status
from dcdit.errors import UserError
from dcdit.evaluation.features import Features
from dcdit.evaluation.statistics import Statistics
from dcdit.runs.failure import note_failure
from dcdit.runs.progress import progress_of
from dcdit.runs.state import RunState, State
from dcdit.runtime import files, limits
from dcdit.runtime.files import read_json, replacing, write_csv, write_json


@pytest.fixture
def small(tmp_path):
    """A disk of four megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    with (place / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_what_was_there_stays_when_the_disk_is_full(small):
    path = small / "x.json"
    write_json(path, {"a": 1})
    fill(small)
    with pytest.raises(UserError, match=r"x\.json cannot be written, the disk is full: make room there"):
        write_json(path, list(range(100_000)))
    assert json.loads(path.read_text()) == {"a": 1}
    for save in (
        lambda file: np.savez(file, a=np.zeros(100_000)),
        lambda file: np.save(file, np.zeros(100_000)),
        lambda file: torch.save({"a": torch.zeros(100_000)}, file),
    ):
        with pytest.raises(UserError, match="the disk is full"), replacing(small / "y") as file:
            save(file)
    assert {each.name for each in small.iterdir()} == {"x.json", "filler"}


def test_training_on_a_full_disk(tiny, small, digits):
    run = small / "run"
    run.mkdir()
    (Path(small).parent / "run").symlink_to(run)
    tiny("run", "trainer.max_steps=2")
    before = {path: path.read_bytes() for path in run.rglob("*.ckpt")}
    fill(small)
    with pytest.raises(UserError, match=r"cannot be written, the disk is full"):
        tiny("run", "trainer.max_steps=4", "ckpt_path=last")
    assert {path: path.read_bytes() for path in run.rglob("*.ckpt")} == before
    state = RunState.read(run)
    note_failure(UserError("the reason"), run, (), sweeping=False)  # cannot be noted, which is no other error
    assert RunState.read(run) == state
    (small / "filler").unlink()
    tiny("run", "trainer.max_steps=4", "ckpt_path=last")
    assert RunState.read(run).state is State.FINISHED


def test_a_folder_that_is_read_only_is_found_before_work_begins(trained_run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refuse(self, *ignored, **named):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    called = []
    monkeypatch.setattr("dcdit.sampling.generate.generate", lambda *a, **k: called.append(1))
    arguments = (f"checkpoint={trained_run}/checkpoints/last.ckpt", f"out={out}", "count=4")
    with pytest.raises(UserError, match=r"out=.*cannot be written \(Permission denied\)") as caught:
        call(generate, compose_config(*arguments, name="generate"))
    assert "make room" not in str(caught.value)
    assert not called


def test_runs_of_others_can_be_looked_at(trained_run, monkeypatch):
    """Asked with nothing but reading allowed."""
    with nothing_outside():
        assert progress_of(trained_run, "x").state is State.FINISHED
        call(status, compose_config(f"runs=[{trained_run}]", name="status"))


def test_a_run_directory_of_a_stranger_is_shown_or_said(trained_run, tmp_path, capsys):
    """A bomb of references in its configuration is not read at all; a state that cannot be takes down its own row."""
    folder = tmp_path / "runs"
    shutil.copytree(trained_run, folder / "good")
    shutil.copytree(trained_run, folder / "bad")
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    (folder / "good" / "config.yaml").write_text("\n".join(lines))
    (folder / "bad" / "state.json").write_text('{"state": "finished", "step": "/etc"}')
    (folder / "bad" / "logs" / "version_x").mkdir(parents=True)
    (folder / "bad" / "logs" / "version_x" / "metrics.csv").write_bytes(b"\xff\x00")
    found = {each.name: each for each in call(status, compose_config(f"runs=[{folder}]", name="status"))}
    assert found["good"].state is State.FINISHED
    assert found["bad"].state is State.CORRUPT
    assert "state.json" in found["bad"].reason
    assert "bad: " in capsys.readouterr().out


def test_a_calibration_works_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    from dcdit.sampling.budget import Calibration, FileLock, remembered

    def refuse(*ignored, **named):
        raise PermissionError(13, "Permission denied")

    found = Calibration(None, 0.5, 0.0, 1.0, 2.0)
    assert remembered(Calibration, tmp_path / "x.ckpt", {"a": 1}, lambda: found) == found
    monkeypatch.setattr(FileLock, "acquire", refuse)
    monkeypatch.setattr(files, "_Raw", refuse)
    assert remembered(Calibration, tmp_path / "x.ckpt", {"a": 1}, refuse) == found  # known already
    other = Calibration("path", 0.1, 0.2, 1.9, 2.0)
    assert remembered(Calibration, tmp_path / "x.ckpt", {"a": 2}, lambda: other) == other
    assert "not kept for the next time" in capsys.readouterr().out


def test_writers_that_meet_both_end_well(tmp_path):
    path, errors = tmp_path / "x.json", []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                write_json(path, [number] * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    found = json.loads(path.read_text())
    assert len(found) == 1000
    assert len(set(found)) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


def test_drafts_of_the_dead_are_removed_and_of_the_living_are_not(tmp_path):
    host = files.socket.gethostname()
    dead = subprocess.run(["true"]), 2**22 - 3
    names = {"dead": f".x.json.{host}-{dead[1]}-0.part", "alive": f".x.json.{host}-{os.getpid()}-0.part"}
    names["elsewhere"] = ".x.json.another-1-0.part"
    names["no process"] = f".x.json.{host}-{10**30}-0.part"
    for name in names.values():
        (tmp_path / name).touch()
    write_json(tmp_path / "y.json", 1)
    assert {each.name for each in tmp_path.iterdir()} == {"y.json", *list(names.values())[1:]}


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x"
    path.write_text("before")
    for error in (KeyboardInterrupt, RuntimeError("no"), OSError("a server")):
        with suppress(KeyboardInterrupt, RuntimeError, OSError), replacing(path) as file:
            file.write(b"half")
            raise error
        assert path.read_text() == "before"
        assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_formulas_in_tables_stay_text(tmp_path):
    write_csv(tmp_path / "x.csv", ["run", "=1"], [{"run": "=cmd|' /C calc'!A0", "=1": -2.5}, {"run": "+x"}])
    assert (tmp_path / "x.csv").read_text().splitlines() == ["run,'=1", "'=cmd|' /C calc'!A0,-2.5", "'+x,"]


def some_statistics() -> Statistics:
    return Statistics.of([Features(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), None)], 20)


READERS = {
    "state.json": (
        lambda path: RunState(State.RUNNING, 3, 9).write(path.parent),
        lambda path: RunState.read(path.parent),
    ),
    "statistics.npz": (
        lambda path: some_statistics().save(path),
        lambda path: [
            each.tolist() for each in (lambda s: (s.moments.total, s.moments.outer, s.features))(Statistics.load(path))
        ],
    ),
    "plan.json": (
        lambda path: write_json(path, {"a": [1, 2.5, "text", None], "b": {"c": True}}),
        lambda path: read_json(path, dict[str, object], "write it again"),
    ),
}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages)
def test_any_damage_is_an_error_that_names_the_file(tmp_path_factory, name, damage):
    path = tmp_path_factory.mktemp("files") / name
    write, read = READERS[name]
    write(path)
    path.write_bytes(damaged(path.read_bytes(), damage))
    with nothing_outside(path.parent):
        try:
            read(path)  # JSON has no checksum: other values of the right kind are all that can come out
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017 - whether it raises depends on the place


def test_files_without_end_are_not_read(tmp_path):
    big = tmp_path / "state.json"
    with big.open("wb") as file:
        file.truncate(limits.TEXT_BYTES + 1)
    with pytest.raises(UserError, match=r"at most \d+ are read there"):
        RunState.read(tmp_path)
    big.unlink()
    os.mkfifo(big)
    with pytest.raises(UserError, match="is no regular file"):
        RunState.read(tmp_path)
    big.unlink()
    big.write_text("[" * 1_000_000)
    with pytest.raises(UserError, match=r"state\.json"):
        RunState.read(tmp_path)
