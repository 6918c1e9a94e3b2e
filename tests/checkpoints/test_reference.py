import argparse
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcdit import DCDiT
from dcdit.checkpoints.read import read_checkpoint
from dcdit.checkpoints.reference import load_reference
from dcdit.errors import UserError

STATE = Path(__file__).parents[1] / "golden" / "mini" / "state.safetensors"


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_reference_file_loads_without_running_its_pickle(tmp_path, monkeypatch):
    # A module that exists while saving only, as the reference's package does for a stranger.
    module = types.ModuleType("their_package")
    exec("class Config:\n    def __init__(self): self.depth = 3", module.__dict__)
    module.Config.__module__ = "their_package"
    monkeypatch.setitem(sys.modules, "their_package", module)
    state = {name: tensor.float() for name, tensor in load_file(STATE).items()}
    path = tmp_path / "reference.pt"
    raw = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    config = {"arch": module.Config(), "args": argparse.Namespace(lr=1e-4)}
    torch.save({"model": raw, "ema": state, "opt": {}, "config": config}, path)
    monkeypatch.delitem(sys.modules, "their_package")

    net = load_reference(path, heads=4)
    direct = load_reference(state, heads=4)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), direct.parameters(), strict=True))
    assert not net.training
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path):
    marker, path = tmp_path / "exploded", tmp_path / "hostile.pt"
    torch.save({"ema": {}, "config": Bomb(marker)}, path)
    with pytest.raises(UserError, match=r"it asks to run posix\.system"):
        load_reference(path, heads=4)
    assert not marker.exists()


def test_the_network_is_read_off_the_shapes():
    net = load_reference(dict(load_file(STATE)), heads=4)
    assert isinstance(net, DCDiT)
    assert (net.grid, net.channels, net.num_classes) == ((8, 8), 4, 4)


def test_clear_refusals(tmp_path):
    state = dict(load_file(STATE))
    with pytest.raises(UserError, match="pass heads="):
        load_reference(state)
    with pytest.raises(UserError, match="heads=7 does not divide"):
        load_reference(state, heads=7)
    with pytest.raises(UserError, match=r"'surprise.weight' is not one of"):
        load_reference({**state, "surprise.weight": torch.zeros(1)}, heads=4)
    with pytest.raises(UserError, match="does not fit"):
        load_reference({k: v for k, v in state.items() if k != "final_layer.linear.bias"}, heads=4)
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(UserError, match="cannot be read safely"):
        read_checkpoint(tmp_path / "text.pt")
