"""What is read of a run's logs, and how it is shown while it goes on."""

import io
import os
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.commands import typed
from support.configs import check, compose_config

from dcdit import status
from dcdit.errors import UserError
from dcdit.reporting.collect import find_results
from dcdit.reporting.histories import histories_below
from dcdit.runs.history import history_of, means, sparkline
from dcdit.runs.lock import LOCK, is_held, sole_writer
from dcdit.runs.progress import format_bytes, size_on_disk
from dcdit.runs.state import RunState, State


def log(run, version, text):
    path = run / "logs" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_later_file_takes_the_place_of_what_it_does_anew_and_what_is_damaged_is_left_out(tmp_path):
    log(tmp_path, 0, "step,loss,keep\n1,3.0,\n2,2.0,0.3\n3,nan,0.4\n4,1.5")
    log(tmp_path, 10, "step,loss\n3,1.0\n4,0.5,7,8\n\x00")
    log(tmp_path, 2, "step,loss\n3,9.0\n")
    history = history_of(tmp_path)
    assert history.courses["loss"] == ([1, 2, 3, 4], [3.0, 2.0, 1.0, 0.5])
    assert history.courses["keep"] == ([2], [0.3])  # the second file went back to step 3, and did not log it
    assert history.last["keep"] == 0.3
    assert history.last["loss"] == 0.5
    assert history.values("nothing") == ()
    log(tmp_path, 11, "step,loss\n5,0.25\n")
    assert history_of(tmp_path).last["loss"] == 0.25
    assert history_of(tmp_path / "nowhere").courses == {}


@given(st.lists(st.floats(-1e6, 1e6), max_size=60), st.integers(1, 30))
def test_a_sparkline_is_as_high_as_its_values(values, width):
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    heights = means(values, width)
    if line:
        assert line[heights.index(min(heights))] == "▁"
        if max(heights) > min(heights):
            assert line[heights.index(max(heights))] == "█"
    if len(values) <= width:
        assert heights == pytest.approx(values)


def test_sizes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" * 1500)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    assert size_on_disk(tmp_path) == 1500
    assert [format_bytes(each) for each in (0, 999, 1500, 2.5e6, 7e12)] == ["0 B", "999 B", "1.5 kB", "2.5 MB", "7 TB"]


def test_watching_ends_with_the_last_run(trained_run, tmp_path, monkeypatch):
    """Three looks: a run that goes on, further on, and finished."""
    known = RunState.read(trained_run)
    replace(known, state=State.RUNNING, max_steps=90, metrics={}).write(trained_run)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 1:
            log(trained_run, 5, "step,train/diffusion_loss,train/images_per_s\n44,0.125,8\n")
        else:
            replace(known, state=State.FINISHED, max_steps=90, step=90).write(trained_run)

    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep, strftime=time.strftime))  # other threads sleep too
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=160)
    settings = check(status, compose_config(f"runs=[{tmp_path}]", "watch=true", "every=0.5", name="status"))
    with sole_writer(trained_run, 0):
        found = status.watch(settings, console)
    assert looks == [0.5, 0.5]
    assert [each.state for each in found.values()] == [State.FINISHED]
    text = shown.getvalue()
    for words in ("running", "finished", "45 of 90", "0.125", "free on disk", " MB", "45 s"):
        assert words in text


def test_watching_waits_for_what_is_about_to_begin(trained_run, tmp_path, capsys, monkeypatch):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt
        trained_run.rename(tmp_path / "runs")  # what was not there yet is

    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep, strftime=time.strftime))  # other threads sleep too
    result = typed(capsys, tmp_path, "status", "runs", "--watch")
    assert result.status == 0, result.err
    assert looks == [2.0, 2.0]
    assert "3 of 3" in result.out
    assert "waiting for a run to go on" in result.out
    assert "Ctrl-C ends this" in result.out
    with pytest.raises(UserError, match=r"every=0 is outside \[0.2, 3600\]: seconds between two looks"):
        check(status, compose_config("runs=[x]", "every=0", name="status"))


def _link_in_a_circle(path):
    path.symlink_to(path)


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


KINDS = {
    "fifo": os.mkfifo,
    "directory": os.mkdir,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "circle": _link_in_a_circle,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "fifo behind a link": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
}
FILES = (
    *("state.json", ".running.lock", ".queued", "config.yaml", "logs/version_0/metrics.csv", "logs/version_0", "logs"),
    *("evaluation/x.json", "evaluation", "validation/step_00000001_samples.png", "checkpoints/last.ckpt", "more"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_hides_no_other_run(tmp_path, kind):
    """Whatever stands in the place of a run's files, the other run is shown, at once."""
    for number, name in enumerate(("whole", *FILES)):
        run = tmp_path / "runs" / f"run{number}"
        log(run, 0, f"step,train/loss,train/diffusion_loss\n{number},1.0,2.0\n")
        RunState(State.FINISHED, step=number + 1, max_steps=99).write(run)
        for other in ("evaluation", "validation", "checkpoints"):
            (run / other).mkdir()
        if number:
            path = run / name
            if path.exists():
                _remove(path)
            KINDS[kind](path)
    before = signal.signal(signal.SIGALRM, lambda *ignored: pytest.fail("it hangs"))
    signal.alarm(30)
    try:
        seen = status.read_progress(check(status, compose_config(f"runs=[{tmp_path}/runs]", name="status")))
        courses = {course.path.name for course in histories_below([f"{tmp_path}/runs"])}
        find_results([f"{tmp_path}/runs"])
        for path in seen:
            size_on_disk(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    steps = {path.name: (each.state, each.step) for path, each in seen.items()}
    assert steps["run0"] == (State.FINISHED, 1)
    assert len(seen) >= len(FILES)  # a link to nothing is no state
    assert "run0" in courses
    assert {f"run{number}" for number, name in enumerate(FILES, 1) if not name.startswith("logs")} - courses <= {"run1"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_that_is_no_file_is_told_or_serves(tmp_path, kind):
    KINDS[kind](tmp_path / LOCK)
    try:
        with sole_writer(tmp_path, 0):
            pass
    except UserError as error:
        assert LOCK in str(error)  # noqa: PT017 - whether it raises depends on the kind
    assert not is_held(tmp_path)
