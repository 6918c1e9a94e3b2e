"""What is shown: text cannot steer a terminal, and showing it never ends what is computed."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.live import Live
from rich.table import Table
from rich.text import Text
from support.commands import typed
from support.configs import TINY
from support.damage import sign
from support.numbered import write_numbers
from tqdm import tqdm

from dcdit.checks import visible
from dcdit.runs.state import RunState, State
from dcdit.runtime.display import Console, Display
from dcdit.runtime.terminal import Terminal, install, lost

HOSTILE = "a\x1b[2J\x1b]0;t\x07\r\x9b31m\u202e[/red]:smile:[b"
ENCODINGS = ("ascii", "latin-1", "cp1252", "koi8-r", "utf-8")


def steers(text):
    """Whether there is anything in ``text`` that a terminal would obey."""
    return any(visible(each) != each for each in text.replace("\t", "").split("\n"))


@pytest.fixture
def streams(monkeypatch):
    """Takes the place of both streams: returns what was written to each, as it lies in the file."""

    def take(encoding):
        files = [io.BytesIO(), io.BytesIO()]
        for name, file in zip(("stdout", "stderr"), files, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(file, encoding, write_through=True))
        install()
        return files

    return take


@given(st.text(), st.sampled_from(ENCODINGS))
def test_any_text_in_any_encoding(text, encoding):
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding, newline="", write_through=True)
    Terminal(stream).write(text)
    written = file.getvalue().decode(encoding)
    assert not steers(written)
    if text.isascii() and not steers(text):
        assert written == text


def test_whoever_prints(streams):
    out, err = streams("utf-8")
    print(HOSTILE)
    logging.StreamHandler(sys.stderr).emit(logging.makeLogRecord({"msg": HOSTILE}))
    sys.stderr.writelines([HOSTILE])
    sys.excepthook(ValueError, ValueError(HOSTILE), None)
    for console in (Console(), Console(force_terminal=True, width=200)):
        table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
        table.add_row(HOSTILE)
        console.print(table)
        console.print(Text(HOSTILE))
    for file, times in ((out, 1 + 2 * 5), (err, 3)):
        text = file.getvalue().decode()
        assert text.count(r"\x1b[2J") == times
        assert text.count("\x1b[2J") == text.count("\x07") == text.count("\x9b") == text.count("\u202e") == 0
    assert not steers(err.getvalue().decode())
    assert "[/red]:smile:[b" in out.getvalue().decode()  # neither markup nor emoji


def test_what_is_printed_beside_a_bar(streams):
    out, err = streams("utf-8")
    with Live(console=Console(force_terminal=True)):
        print(HOSTILE)
    assert not any(each in (out.getvalue() + err.getvalue()).decode() for each in ("\x1b[2J", "\x07", "\u202e", "\x9b"))


def test_libraries_draw_their_bars(streams):
    _, err = streams("utf-8")
    list(tqdm(range(3)))
    assert b"\r" in err.getvalue()
    Console(stderr=True, force_terminal=True).print(Text("x", "bold"))
    assert b"\x1b[1mx" in err.getvalue()


class Gone(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "pipe"), OSError(5, "terminal"), OSError(28, "disk"), ValueError("closed"), None]
)
def test_a_stream_that_takes_nothing(monkeypatch, error):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Gone(error) if error else None)
    install()
    for _ in range(2):
        print("x")
        print("x", file=sys.stderr, flush=True)
        with Display(0, "drawing", "chunk") as display:
            display.start(2, 1, 3)
            display.finish("a", 1)
        for stderr in (False, True):
            Console(force_terminal=True, stderr=stderr).print(Text("x"))
        sys.stdout.flush()
    if error:  # the text is gone, and the stream says why
        assert lost(sys.stdout) is error


@pytest.mark.parametrize(
    ("error", "status"), [(BrokenPipeError(32, "pipe"), 0), (ValueError("closed"), 0), (OSError(28, "disk full"), 2)]
)
def test_only_a_full_disk_is_told(monkeypatch, tmp_path, capsys, error, status):
    """Who closed a pipe has seen enough."""
    monkeypatch.setattr(sys, "stdout", Gone(error))
    result = typed(capsys, tmp_path, "flops", "model=dit_s_2")
    assert result.status == status
    assert ("disk full" in result.words) == (status == 2)


def watched(monkeypatch, folder):
    """A run that goes on."""
    monkeypatch.setattr("dcdit.runs.progress.is_held", lambda path: True)
    RunState(State.RUNNING).write(folder)


def test_watching_ends_when_nobody_looks(monkeypatch, tmp_path, capsys):
    watched(monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "stdout", Gone(BrokenPipeError(32, "pipe")))
    assert typed(capsys, tmp_path, "status", str(tmp_path), "--watch", "every=0.2").status == 0


SAMPLING = ["checkpoint=RUN", "sampler.steps=2", "out=x"]


@pytest.mark.parametrize(
    ("command", "words", "encoding"),
    [
        *(("status", ["RUN"], encoding) for encoding in ENCODINGS[:-1]),
        *(("flops", ["checkpoint=RUN"], encoding) for encoding in ENCODINGS[:-1]),
        ("report", ["RUN"], "latin-1"),
        ("sample", [*SAMPLING, "classes=[1]", "per_class=1", "frames=2"], "latin-1"),
        ("generate", [*SAMPLING, "count=2"], "latin-1"),
        ("export", ["checkpoint=RUN", "out=x"], "latin-1"),
        ("inspect_latents", ["directory=DATA", "split=val"], "latin-1"),
        ("train", [*TINY, "data.directory=DATA", "trainer.max_steps=0"], "latin-1"),
        ("explore", ["host=ρ•"], "latin-1"),
    ],
)
def test_any_encoding_of_the_terminal(streams, capsys, tmp_path, three_steps, digits, command, words, encoding):
    _, err = streams(encoding)
    given = [word.replace("RUN", str(three_steps)).replace("DATA", str(digits)) for word in words]
    status = typed(capsys, tmp_path, command, *given).status
    assert b"Traceback" not in err.getvalue()
    assert status == (2 if command in ("explore", "train") else 0), err.getvalue()


def test_processes_on_a_terminal_of_another_encoding(tmp_path, digits):
    """The bar is drawn, for a terminal that goes away in the middle; then the samples, whose words have a ρ."""
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "TTY_COMPATIBLE": "1"}

    def begin(command, *words):
        line = [sys.executable, "-m", f"dcdit.{command}", *words]
        return subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    words = [word for word in TINY if not word.startswith("callbacks.progress")]
    training = begin("train", *words, f"data.directory={digits}", "run_dir=run", "trainer.max_steps=9")
    seen = training.stdout.read(2000)
    training.stdout.close()
    assert training.wait(120) == 0
    assert RunState.read(tmp_path / "run").state is State.FINISHED
    assert b"training" in seen
    assert rb"\u2022" in seen
    sampling = begin("sample", "checkpoint=run", "classes=[1]", "per_class=1", "frames=2", "sampler.steps=2")
    said, _ = sampling.communicate(timeout=120)
    assert sampling.returncode == 0
    assert rb"\u03c1" in said


def test_names_of_strangers(tmp_path, capsys):
    """Of runs, classes and autoencoders, and the reasons of failures."""
    data = tmp_path / "data" / "train"
    data.mkdir(parents=True)
    write_numbers(data, [3, 2])
    path = data / "manifest.json"
    classes = json.loads(path.read_text())["classes"]
    sign(path, classes=[HOSTILE, *classes[1:]], autoencoder=HOSTILE)
    run = tmp_path / "runs" / HOSTILE.replace("/", "")
    run.mkdir(parents=True)
    RunState(State.FAILED, reason=HOSTILE + "x" * 10**6).write(run)
    (run / "logs" / "version_0").mkdir(parents=True)
    (run / "logs" / "version_0" / "metrics.csv").write_text("step,train/diffusion_loss\n0,1\n1,0.5\n")
    for command, words in (
        ("inspect_latents", ["directory=data", "images=0"]),
        ("status", ["runs"]),
        ("report", ["runs"]),
        ("flops", [f"checkpoint={run.relative_to(tmp_path)}"]),
        ("sample", [f"checkpoint={HOSTILE}"]),
    ):
        result = typed(capsys, tmp_path, command, *words)
        assert not steers(result.out + result.err)
        assert command == "report" or r"\x1b[2J" in result.words.replace(" ", "")
        assert len(result.words) < 20_000
