"""Commands as a user types them, from an empty directory; the longer ones have tests of their own."""

import re
import subprocess
import sys

import pytest
from support.commands import typed

from dcdit import __version__
from dcdit.__main__ import COMMANDS
from dcdit.__main__ import main as dcdit
from dcdit.settings.compose import compose_values
from dcdit.settings.help import choices


@pytest.mark.parametrize(
    ("command", "words", "shown", "files"),
    [
        ("sample", ["checkpoint={run}/checkpoints/last.ckpt", "sampler.steps=2", "out=out"], "40 samples, ", {"out"}),
        ("flops", ["model=dcdit_b", "drop_fractions=[0,0.2]"], "without residual projection, as published", set()),
        ("inspect_latents", ["directory={digits}", "picture=picture.png"], "all right", {"picture.png"}),
        ("status", ["{run}"], "finished", set()),
    ],
)
def test_commands(three_steps, digits, tmp_path, capsys, command, words, shown, files):
    result = typed(capsys, tmp_path, command, *(word.format(run=three_steps, digits=digits) for word in words))
    assert result.status == 0, result.err
    assert shown in result.out
    assert {path.name for path in tmp_path.iterdir()} == files


def test_a_mistyped_key_in_either_way_of_calling(tmp_path):
    """In processes: that both ways of calling are one is the point."""
    found = []
    for line in (["-m", "dcdit.flops"], ["-m", "dcdit", "flops"]):
        result = subprocess.run(
            [sys.executable, *line, "+nonsense=1"], capture_output=True, text=True, timeout=300, cwd=tmp_path
        )
        assert result.returncode == 2
        assert "nonsense=1: there is no such key" in result.stderr
        assert "Traceback" not in result.stderr
        found.append((result.stdout, result.stderr))
    assert found[0] == found[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_groups_of_the_command_and_its_keys(tmp_path, capsys, command):
    result = typed(capsys, tmp_path, command, "--help")
    assert result.status == 0
    groups = {
        "train": {"model", "data", "trainer", "multi_budget", "callbacks", "experiment", "cluster", "resolution"},
        "flops": {"model", "resolution"},
        **{name: {"sampler"} for name in ("sample", "generate", "explore")},
        "evaluate": {"sampler", "features"},
        "score": {"features"},
        "extract": {"reader"},
    }.get(command, set())
    shown = dict(re.findall(r"^  (\w+) +(\S.*)$", result.out.split("Keys (")[0], flags=re.MULTILINE))
    assert groups <= set(shown)
    assert command == "train" or set(shown) == groups
    for group in groups:
        assert set(choices(group)) <= set(shown[group].split())
    keys = result.out.split("Keys (")[1]
    lines = re.findall(r"^ +\w+:.*$", keys, flags=re.MULTILINE)
    assert lines
    assert [line for line in lines if " #" not in line] == [], "each key is described"
    named = re.findall(r"^  (\w+):", keys, flags=re.MULTILINE)
    assert len(named) == len(set(named))
    assert ("sampler.cache" in result.out) == ("sampler" in groups)


@pytest.mark.parametrize(
    ("command", "group"),
    [
        ("train", "model"),
        ("train", "diffusion"),
        ("train", "alignment"),
        ("train", "optimizer"),
        ("train", "multi_budget"),
        ("sample", "sampler"),
    ],
)
def test_help_names_the_keys_of_every_choice_of_a_group(tmp_path, capsys, command, group):
    shown = re.findall(rf"\b{group}\.(\w+)\b", typed(capsys, tmp_path, command, "--help").out.split("Keys (")[0])
    there = {key for choice in choices(group) for key in compose_values(command, [f"{group}={choice}"])[group]}
    assert set(shown) == there - {"name"}
    assert len(shown) == len(set(shown))


def test_help_names_the_choice_that_a_command_makes_instead_of_the_shared_one(tmp_path, capsys):
    assert re.search(r"sampler .*\(now: few\)", typed(capsys, tmp_path, "explore", "--help").out)
    keys = typed(capsys, tmp_path, "explore", "--help").out.split("Keys (")[1]
    assert re.search(r"^  checkpoint: digits +# a file, .*$", keys, flags=re.MULTILINE)


def test_what_is_no_command_is_answered_with_the_list():
    result = subprocess.run([sys.executable, "-m", "dcdit", "trian"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "'trian' is none of them, did you mean train?" in result.stderr
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


def test_completion_knows_bash_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dcdit", "completion", "zsh"])
    with pytest.raises(SystemExit) as leaving:
        dcdit()
    assert (leaving.value.code, "dcdit completion bash" in capsys.readouterr().err) == (2, True)


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dcdit", "--version"])
    dcdit()
    assert capsys.readouterr().out == f"dcdit {__version__}\n"
