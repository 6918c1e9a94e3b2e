"""Commands as a user types them, from an empty directory; the longer ones have tests of their own."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "words", "shown", "files"),
    [
        ("sample", ["checkpoint={run}/checkpoints/last.ckpt", "sampler.steps=2", "out=out"], "40 samples of", {"out"}),
        ("flops", ["model=dcdit_b", "drop_fractions=[0,0.2]"], "without residual projection, as published", set()),
        ("inspect_latents", ["directory={digits}", "picture=picture.png"], "all right", {"picture.png"}),
    ],
)
def test_commands(tiny, digits, tmp_path, command, words, shown, files):
    run = tiny("run", "trainer.max_steps=2")
    place = tmp_path / "place"
    place.mkdir()
    line = [sys.executable, "-m", f"dcdit.{command}", *(word.format(run=run, digits=digits) for word in words)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=place)
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout
    assert {path.name for path in place.iterdir()} == files


def test_a_mistyped_key(tmp_path):
    line = [sys.executable, "-m", "dcdit.flops", "+nonsense=1"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 2
    assert "nonsense=1: there is no such key" in result.stderr
    assert "Traceback" not in result.stderr
