"""The measurements of ``benchmarks/gpu.sh``: what a stage does stands on the page, and its failure ends no other."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks" / "gpu"))

import run
from pack import WANTED, pins
from page import closed
from stages import EXTRA, STAGES, Command, Place, Stage


def stage(name: str, *programs: str, limit: int = 20, **options) -> Stage:
    return Stage(name, f"about {name}", 1, limit, lambda place: [Command(("-c", each), **options) for each in programs])


@pytest.fixture
def measure(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "about_machine", lambda *_: {"GPU": "none"})
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))

    def call(*stages: Stage, budget: float = 60) -> tuple[int, str, dict[str, str]]:
        status = run.measure(list(stages), budget, rehearsal=True)
        page = max((tmp_path / "out").glob("*.md"), key=lambda each: each.stat().st_mtime_ns)
        states = json.loads(page.with_suffix(".json").read_text())
        return status, page.read_text(), {name: about["state"] for name, about in states.items()}

    return call


def test_a_stage_that_fails_ends_no_other(measure):
    broken = "import sys; print('so far'); sys.exit('the reason')"
    status, page, states = measure(stage("one", broken, "print('second command')"), stage("two", "print('fine')"))
    assert status == 1
    assert states == {"one": "failed", "two": "finished"}
    for words in ("so far", "the reason", "failed with exit status 1", "second command", "fine"):
        assert words in page


def test_a_stage_is_ended_at_its_limit_with_all_that_it_started(measure, tmp_path):
    alive = tmp_path / "alive"
    child = f"import time\nwhile True: open({str(alive)!r}, 'a').write('x'); time.sleep(0.1)"
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    status, page, states = measure(stage("long", program, limit=3, markdown=False), stage("next", "print('fine')"))
    assert time.monotonic() - begin < 15
    assert status == 1
    assert states == {"long": "ended at its limit", "next": "finished"}
    assert "begun" in page
    assert page.count("```") % 2 == 0
    size = alive.stat().st_size
    time.sleep(0.5)
    assert alive.stat().st_size == size


def test_after_the_budget_nothing_starts(measure):
    _, page, states = measure(stage("one", "print('fine')"), budget=5)
    assert states == {"one": "no time left"}
    assert "fine" not in page


def test_the_page_is_whole_while_a_command_runs(measure, tmp_path):
    looks = (
        "import pathlib, sys, time\n"
        "print('half of a line', end='', flush=True)\n"
        "time.sleep(2.5)\n"
        f"page = next(pathlib.Path({str(tmp_path / 'out')!r}).glob('*.md')).read_text()\n"
        "assert '| one | about one | runs |' in page and 'half of a line' in page, page\n"
        "assert page.count(3 * chr(96)) == 2, page\n"
    )
    status, page, states = measure(stage("one", looks, markdown=False))
    assert states == {"one": "finished"}, page
    assert status == 0


def test_half_the_batch_is_tried_where_all_of_it_does_not_fit(measure):
    words = ("-c", "import sys; sys.exit('out of memory')")
    some = Stage("one", "", 1, 20, lambda place: [Command(words, otherwise=("-c", "print('half')"))])
    _, page, states = measure(some)
    assert states == {"one": "finished"}
    assert page.index("out of memory") < page.index("half\n")


def test_an_earlier_page_stays(measure, tmp_path):
    measure(stage("one", "print(1)"))
    measure(stage("one", "print(2)"))
    assert len(list((tmp_path / "out").glob("*.md"))) == 2


def test_a_fence_that_is_open_is_closed():
    assert closed("a\n```\nb") == "a\n```\nb\n```"
    assert closed("```\nb\n```\n") == "```\nb\n```\n"


@pytest.mark.parametrize("rehearsal", [False, True])
def test_commands_are_of_scripts_that_exist(rehearsal, tmp_path):
    names = [each.name for each in (*STAGES, *EXTRA)]
    assert len(set(names)) == len(names)
    for each in (*STAGES, *EXTRA):
        for command in each.commands(Place(rehearsal, tmp_path)):
            assert command.words[0] == "-m" or (ROOT / command.words[0]).is_file()
    assert sum(each.takes for each in STAGES) <= 620, "about ten minutes"


def test_pins_are_those_of_the_other_python():
    text = 'a==1.0; python_version >= "3.11"\na==0.9; python_version < "3.11"\nb==2.1\n'
    assert pins(text, ("a", "b")) == ["a==1.0", "b==2.1"]
    with pytest.raises(SystemExit, match="no version of c"):
        pins(text, ("a", "c"))
    found = pins((ROOT / "constraints.txt").read_text(), WANTED)
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", each) for each in found)


def test_without_a_gpu_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "about_machine", lambda *_: {"GPU": "none"})
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    assert run.measure([stage("one", "print('ran')")], 60, rehearsal=False) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "torch sees no GPU here" in said.err
    assert not (tmp_path / "out").exists()
