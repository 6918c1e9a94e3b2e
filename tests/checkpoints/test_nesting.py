"""Weights of other programs are found below the keys, and behind the prefixes of names, that these programs use."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.foreign import small_dit

from dcdit.checkpoints.foreign import reference_state
from dcdit.checkpoints.load import load_model
from dcdit.checkpoints.nesting import CONTAINERS, KEYS, PREFIXES
from dcdit.checkpoints.settings import AssumeSettings
from dcdit.errors import UserError


def under(prefix: str, weights: dict) -> dict:
    return {prefix + name: tensor for name, tensor in weights.items()}


def shifted(weights: dict) -> dict:
    return {name: tensor + (name != "pos_embed") for name, tensor in weights.items()}


def loaded(path: Path, values: dict, kind: str = "ema"):
    torch.save(values, path)
    return load_model(path, kind, assume=AssumeSettings(heads=4, diffusion="flow")).network.state_dict()


@pytest.fixture(scope="module")
def weights():
    return reference_state(small_dit(depth=1))


def same(found, weights) -> bool:
    return torch.equal(found["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("key", [key for keys in KEYS.values() for key in keys])
def test_every_key_that_holds_weights(tmp_path, weights, key):
    kind = "raw" if key == "model" else "ema"
    rest = {"optimizer": {"state": {}}, "step": 3, "args": None}
    for state in (weights, under("module.", weights), {"module": weights}, {"state_dict": under("model.", weights)}):
        assert same(loaded(tmp_path / "x.pt", {key: state, **rest}, kind), weights)


@pytest.mark.parametrize("averaged", KEYS["ema"])
@pytest.mark.parametrize("key", KEYS["raw"])
def test_averaged_weights_beside_raw_ones(tmp_path, weights, averaged, key):
    raw = shifted(weights)
    for outer in (lambda values: values, lambda values: {"state_dict": values}, lambda values: {"model": values}):
        values = outer({key: raw, averaged: {"module": weights}})
        assert same(loaded(tmp_path / "x.pt", values, "ema"), weights)
        assert same(loaded(tmp_path / "x.pt", values, "raw"), raw)


@pytest.mark.parametrize("averaged", PREFIXES["ema"])
@pytest.mark.parametrize("prefix", PREFIXES["raw"])
def test_names_behind_the_prefixes_of_training_modules(tmp_path, weights, averaged, prefix):
    raw, rest = shifted(weights), {"initted": torch.tensor(True), "step": torch.tensor(9), "lpips.x": torch.ones(2)}
    assert same(loaded(tmp_path / "x.pt", under(prefix, raw) | rest), raw)
    assert same(loaded(tmp_path / "x.pt", under(averaged, weights) | rest), weights)
    both = under(prefix, raw) | under(averaged, weights) | rest
    for values in (both, {"state_dict": both, "epoch": 3}):
        assert same(loaded(tmp_path / "x.pt", values, "ema"), weights)
        assert same(loaded(tmp_path / "x.pt", values, "raw"), raw)
    beside = {"model": under(prefix, raw) | under(averaged, shifted(raw)), "ema": weights}
    assert same(loaded(tmp_path / "x.pt", beside, "ema"), weights)
    assert same(loaded(tmp_path / "x.pt", beside, "raw"), raw)
    save_file(both, tmp_path / "x.safetensors")
    found = load_model(
        tmp_path / "x.safetensors", "raw", assume=AssumeSettings(heads=4, diffusion="flow")
    ).network.state_dict()
    assert same(found, raw)


def test_keys_below_keys_end_in_a_message(tmp_path, weights):
    values: dict = weights
    for _ in range(40):
        values = {"model": values}
    with pytest.raises(UserError, match="state"):
        loaded(tmp_path / "x.pt", values)
    with pytest.raises(UserError, match=r"state.*epoch"):
        loaded(tmp_path / "x.pt", {"epoch": 3, "optimizer": {}})
    assert set(CONTAINERS) < set(KEYS["raw"])


@pytest.mark.parametrize(
    "name", ["blocks.0.mlp.w12.weight", "blocks.3.attn.q_norm.weight", "blocks.27.attn.k_norm.weight"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "ema_model."])
def test_blocks_of_lightningdit_are_told_as_such(tmp_path, weights, name, prefix):
    values = under(prefix, {**weights, name: torch.zeros(2)})
    for stored in (values, {"ema": values}, {"model": values, "opt": {}}):
        with pytest.raises(UserError, match=r"weights of LightningDiT.* which dcdit does not read"):
            loaded(tmp_path / "x.pt", stored)
