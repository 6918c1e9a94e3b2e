"""A file of the reference implementation is read again as the export says."""

import shlex
from pathlib import Path

import pytest
import torch
from support.configs import perturb

from dcdit.checkpoints.assumptions import assumptions
from dcdit.checkpoints.export import write_reference
from dcdit.checkpoints.load import Weights, load_model
from dcdit.data.latents import LatentSpec
from dcdit.errors import UserError
from dcdit.network import build_network
from dcdit.sample import sample

SIZES = {"grid": 8, "channels": 4, "num_classes": 3, "width": 64, "depth": 1, "heads": 4}
DCDIT, DIT = {"name": "dcdit", "encoder_width": 64}, {"name": "dit", "patch": 2}
VAE = ("stabilityai/sd-vae-ft-ema", 0.18215, 0.0)
CASES = {
    "published but for the heads": ({**DCDIT, "smoothing_sigma": 1.0}, "ddpm", VAE, {"heads"}),
    "unsmoothed": ({**DCDIT, "smoothing_sigma": None}, "ddpm", VAE, {"heads", "smoothing_sigma"}),
    "smoothed": ({**DCDIT, "smoothing_sigma": 1.7}, "flow", VAE, {"heads", "smoothing_sigma", "diffusion"}),
    "published heads": ({**DIT, "width": 384, "heads": 6}, "ddpm", VAE, set()),
    "no null class": ({**DIT, "label_dropout": 0.0}, "ddpm", VAE, {"heads", "num_classes"}),
    "999 classes": ({**DIT, "num_classes": 999}, "ddpm", VAE, {"heads", "num_classes"}),
    "1,000 classes": ({**DIT, "num_classes": 1000}, "ddpm", VAE, {"heads"}),
    "1,000 classes alone": ({**DIT, "num_classes": 1000, "label_dropout": 0.0}, "ddpm", VAE, {"heads"}),
    "SiT": ({**DIT, "time_input": "reversed", "variance": False}, "flow", VAE, {"heads", "diffusion"}),
    "REPA": ({**DIT, "time_input": "unit"}, "flow", VAE, {"heads", "diffusion"}),
    "pixels": ({**DIT, "channels": 1}, "ddpm", ("identity", 1.0, 0.0), {"heads", "autoencoder"}),
    "scaled pixels": (
        {**DIT, "channels": 3},
        "ddpm",
        ("identity", 2.5, -1e-7),
        {"heads", "autoencoder", "scale", "shift"},
    ),
    "other VAE": (DIT, "ddpm", ("a b/it's=x", 0.18215, 0.0), {"heads", "autoencoder"}),
    "channels": (DIT, "ddpm", (VAE[0], (0.1, 1e-5, 3.0, 1 / 3), (0.0, -2.0, 1e9, 0.5)), {"heads", "scale", "shift"}),
}


def exported(out: Path, case: str):
    """The weights of a case, the text of their export, and the command in it."""
    changes, process, latents, keys = CASES[case]
    torch.manual_seed(0)
    network = build_network({**SIZES, **changes})
    perturb(network)
    spec = LatentSpec((network.channels, 8, 8), *latents, tuple(map(str, range(network.num_classes))))
    training = {"diffusion": {"name": process}}
    weights = Weights("test", network.spec, spec, 3, network.state_dict(), None, training)
    text = write_reference(out, weights, "ema")
    words = shlex.split(text.rpartition("dcdit sample ")[2]) if keys else [f"checkpoint={out}"]
    assert {word.split("=")[0] for word in words[1:]} == {f"assume.{key}" for key in keys}
    return network, weights, words


@pytest.mark.parametrize("case", CASES)
def test_the_command_of_an_export_reads_the_same_network(tmp_path, case):
    network, weights, words = exported(tmp_path / "a file.pt", case)
    config = sample.compose(*words)
    model = load_model(config.checkpoint, assume=config.assume)
    assert {**model.network.spec, "label_dropout": 0} == {**network.spec, "label_dropout": 0}
    assert (model.network.label_dropout == 0) == (network.label_dropout == 0)
    for name, tensor in network.state_dict().items():
        if name != "condition.label.table.weight":  # whose null class is not handed on where it means nothing
            assert torch.equal(model.network.state_dict()[name], tensor), name
    assert model.process.settings.name == weights.process.settings.name
    for key in ("shape", "autoencoder", "scale", "shift"):
        assert getattr(model.latents, key) == getattr(weights.latents, key)

    for left_out in words[1:]:
        rest = sample.compose(*(word for word in words if word != left_out))
        try:
            other = load_model(rest.checkpoint, assume=rest.assume)
        except UserError:
            continue
        same = other.network.spec == model.network.spec and other.process.spec == model.process.spec
        assert not same or other.latents != model.latents, f"{left_out} says nothing"


def test_a_shift_of_times_is_told(tmp_path):
    _, weights, _ = exported(tmp_path / "x.pt", "published heads")
    weights.training["diffusion"].update(name="flow", shift=3.0)
    text = write_reference(tmp_path / "y.pt", weights, "ema")
    assert "assume.diffusion=flow\n" in text
    assert text.endswith("sampler.shift=3")


def test_numbers_for_each_element_are_described():
    latents = LatentSpec((1, 2, 2), "a", (((1.0, 2.0), (3.0, 4.0)),), 0.0, ("a",))
    network = {"width": 384, "heads": 6, "num_classes": 1, "label_dropout": 0.1}
    found = assumptions(network, {"name": "ddpm"}, latents)
    assert found == {"autoencoder": "a", "scale": "<1 to 4 (4 elements)>"}
