"""The network that comes with the package: small, and good at its digits."""

import numpy as np
import pytest
import torch
from support.commands import typed

from dcdit.checkpoints.load import load_model
from dcdit.checkpoints.resolve import SHIPPED, resolve_checkpoint
from dcdit.data.decoder import load_decoder
from dcdit.evaluation.features import DigitsClassifier


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_small(name):
    files = {path.name: path.stat().st_size for path in SHIPPED[name].iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert sum(files.values()) < 2_000_000


def test_a_folder_of_the_same_name_is_another_network(tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    resolve_checkpoint("digits", "runs")
    assert "./digits" not in caplog.text  # there is none
    said = typed(capsys, tmp_path, "export", "checkpoint=digits", "out=digits")
    assert said.status == 0, said.words
    assert "dcdit sample checkpoint=./digits" in (tmp_path / "digits" / "README.md").read_text()
    assert resolve_checkpoint("digits", "runs").path == SHIPPED["digits"]
    assert "the folder here is checkpoint=./digits" in caplog.text
    assert resolve_checkpoint("./digits", "runs").path.resolve() == tmp_path / "digits"


def test_its_digits_are_read_as_what_was_asked_for(tmp_path, capsys):
    words = ("checkpoint=digits", "guidance.scale=3", "sampler=dpm++", "sampler.steps=20", "per_class=10")
    said = typed(capsys, tmp_path, "sample", *words)
    assert said.status == 0, said.words
    folder = tmp_path / "runs" / "pretrained_digits" / "samples"
    assert {path.name for path in folder.iterdir()} == {"samples.png", "boundaries.png", "latents.npz"}
    stored = np.load(folder / "latents.npz")
    decode = load_decoder(load_model("digits").latents, torch.device("cpu"))
    seen = DigitsClassifier()(decode(torch.from_numpy(stored["latents"]))).logits.argmax(1)
    assert (seen.numpy() == stored["labels"]).mean() > 0.9


def test_bf16_is_near_float32():
    """Within what docs/performance.md states."""
    network = load_model("digits").network
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(32) % 10
    for t in (50.0, 300.0, 700.0, 950.0):
        x = torch.randn(32, network.channels, *network.grid, generator=generator)
        with torch.no_grad():
            exact = network(x, torch.full((32,), t), y)
            with torch.autocast("cpu", torch.bfloat16):
                half = network(x, torch.full((32,), t), y)
        noise, rounded = (each.prediction[:, : network.channels].float() for each in (exact, half))
        assert (noise - rounded).norm() < 0.01 * noise.norm()
        assert (exact.routing.mask != half.routing.mask).float().mean() < 0.005
