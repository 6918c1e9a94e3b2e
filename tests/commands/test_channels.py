"""Latents of any number of channels that nothing decodes, through every command that shows or measures images."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.configs import call, check, compose_config

from dcdit import evaluate, explore, generate, report, sample, score
from dcdit.checkpoints.export import Card, write_exported
from dcdit.checkpoints.load import Weights
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.data.arrays import write_shards
from dcdit.data.latents import LatentSpec
from dcdit.explorer.choice import Choice
from dcdit.explorer.session import Session, difference
from dcdit.network import build_network

NAMES = {1: "identity", 2: "identity: the first 1 of 2 channels", 3: "identity"}
FEW = ("sampler.steps=2", "count=12")


def exported(folder, channels):
    """An exported network of a few weights, for latents of so many channels."""
    spec = {"name": "dcdit", "encoder_width": 16, "groups": 8, "smoothing_sigma": None}
    spec |= {"grid": 8, "channels": channels, "num_classes": 2, "width": 32, "depth": 1, "heads": 2}
    torch.manual_seed(0)
    latents = LatentSpec((channels, 8, 8), "identity", 1.0, 0.0, ("a", "b"))
    weights = Weights("test", spec, latents, 3, training={}, ema=build_network(spec).state_dict(), raw=None)
    write_exported(folder, weights, "ema", "fp32", Card(None, None, "", []))
    return folder


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_latents_of_any_channels_are_shown_and_measured_as_what_they_are(tmp_path, channels, capsys, caplog):
    pictures, shown = channels in (1, 3), 3 if channels >= 3 else 1
    name = NAMES.get(channels, f"identity: the first 3 of {channels} channels")
    checkpoint = f"checkpoint={exported(tmp_path / 'net', channels)}"
    random = np.random.default_rng(0)
    real = random.uniform(-1, 1, (60, channels, 8, 8)).astype(np.float32)
    write_shards(tmp_path / "val", real, np.zeros(60, int), classes=("a", "b"), samples_per_shard=60)

    folder = call(
        sample, compose_config(checkpoint, FEW[0], "per_class=2", "animation=gif", f"out={tmp_path}/s", name="sample")
    )
    assert {path.name for path in folder.iterdir()} == {
        *("samples.png", "latents.npz", "boundaries.png", "trajectory.gif")
    }
    assert ("no pictures" in caplog.text) == (not pictures)
    latents = np.load(folder / "latents.npz")["latents"]
    assert latents.shape == (4, channels, 8, 8)

    call(generate, compose_config(checkpoint, *FEW, f"out={tmp_path}/g", "labels=balanced", name="generate"))
    images = np.load(tmp_path / "g" / "samples.npz")["arr_0"]
    assert images.shape == (12, 8, 8, 3)
    assert json.loads((tmp_path / "g" / "samples.json").read_text())["plan"]["autoencoder"] == name

    places = (f"reference={tmp_path}/val", "features=digits", "metrics=[kid,prc]", f"cache={tmp_path}/cache")
    own = f"out={tmp_path}/evaluation"
    words = (checkpoint, *FEW, *places, own, "labels=balanced", "time_rounds=0")
    (measured,) = call(evaluate, compose_config(*words, name="evaluate"))
    assert measured.plan.autoencoder == name
    told = f"no pictures, but {name.removeprefix('identity: ')}"
    capsys_out = " ".join(capsys.readouterr().out.split())
    assert (told in capsys_out) == (not pictures)
    found = call(score, compose_config(f"images={tmp_path}/g/samples.npz", *places, name="score"))
    assert found.metrics == pytest.approx(measured.metrics)
    assert (told in " ".join(capsys.readouterr().out.split())) == (not pictures)
    page = call(report, compose_config(f"runs=[{tmp_path}]", f"out={tmp_path}/report", name="report")).read_text()
    assert page.count(told) == 2 * (not pictures)  # of the measurement and of the score

    config = check(explore, compose_config(checkpoint, name="explore"))
    session = Session(config, [resolve_checkpoint(str(tmp_path / "net"), "runs")], 10)
    image = session.generate(0, Choice(label=0, seed=0, sampler="ddim", steps=2, scale=1.0), lambda *ignored: None)
    assert image.image.shape == (8, 8, shown)
    assert len(image.at(0)) == 4
    assert len(image.animation()) == 3
    assert (name.removeprefix("identity: ") in image.title) == (not pictures)
    grey = replace(image, image=image.image[..., :1])
    assert difference(image.image, grey.image).shape == image.image.shape


def test_the_samples_of_generate_are_the_latents_of_sample(tmp_path):
    """The picture is the first three channels of the very latents, from -1 to 1."""
    checkpoint = f"checkpoint={exported(tmp_path / 'net', 16)}"
    words = (checkpoint, "sampler.steps=2")
    folder = call(sample, compose_config(*words, "classes=[0]", "per_class=2", f"out={tmp_path}/s", name="sample"))
    latents = np.load(folder / "latents.npz")["latents"]
    expected = np.clip(np.floor((latents[:, :3] + 1) * 127.5 + 0.5), 0, 255).astype(np.uint8)
    factor = 8  # small images are enlarged to 64 pixels, with a border of 2
    picture = np.asarray(Image.open(folder / "samples.png"))
    for number in range(2):
        left = 2 + number * (8 * factor + 2)
        shown = picture[2 : 2 + 64 : factor, left : left + 64 : factor]
        assert np.abs(shown.astype(int) - expected[number].transpose(1, 2, 0)).max() <= 1
