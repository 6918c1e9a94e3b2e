"""Numbers that a file or a command line gives: each has a least and a largest."""

import importlib
import inspect
import json
import pkgutil
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from support.damage import rewrite, sign

import dcdit
from dcdit.checkpoints.load import load_model
from dcdit.checks import Bounds, annotations
from dcdit.data.datamodule import StreamState
from dcdit.data.latents import LatentSpec
from dcdit.data.manifest import Manifest, Shard
from dcdit.data.order import Position, Readers
from dcdit.data.statistics import Sums
from dcdit.diffusion.settings import PROCESSES, SAMPLERS
from dcdit.errors import UserError
from dcdit.evaluation import plans, results, scores
from dcdit.network import NETWORKS, DiT, build_network
from dcdit.runs.changes import Change
from dcdit.runs.state import RunState
from dcdit.runtime.jobs import Part
from dcdit.sampling.budget import Calibration


def checked_classes() -> list[type]:
    """Every class of the package that checks its constructor's arguments; what needs Gradio has none."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(dcdit.__path__, "dcdit.")
        if not module.name.endswith(("__main__", "explorer.controls", "explorer.page", "explorer.serving"))
    ]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    own = [kind for kind in classes if kind.__module__.startswith("dcdit.")]
    return [kind for kind in own if hasattr(kind.__init__, "__wrapped__")]


def unbounded(hint: Any, bounded: bool = False) -> bool:
    """Whether an annotation lets a number of any size through."""
    arguments = get_args(hint)
    if get_origin(hint) is Annotated:
        bounds = [each for each in arguments[1:] if isinstance(each, Bounds)]
        return unbounded(arguments[0], bounded or any(None not in (each.low, each.high) for each in bounds))
    if hint in (int, float):
        return not bounded
    return get_origin(hint) is not Literal and any(unbounded(each, bounded) for each in arguments)


READ = (Manifest, Shard, StreamState, Position, Readers, Sums, Change, RunState, Part, Calibration)
RESULT = (
    *(results.Result, results.KeepRatio, results.Timing, results.NetworkDescription),
    *(plans.MeasuredPlan, plans.FeatureDescription, plans.ReferenceDescription),
    *(scores.Score, scores.ScorePlan, scores.SamplingRecord),
)


def test_every_number_has_bounds():
    kinds = checked_classes()
    for table in (NETWORKS, PROCESSES, SAMPLERS, {"latents": LatentSpec}):
        assert set(table.values()) <= set(kinds)
    hints = {
        f"{kind.__name__}.{name}": hint for kind in (*kinds, *READ, *RESULT) for name, hint in annotations(kind).items()
    }
    assert len(hints) > 250
    assert [name for name, hint in hints.items() if unbounded(hint)] == []


SMALL = {"grid": 8, "channels": 4, "num_classes": 4, "width": 384, "depth": 1, "heads": 6}
HUGE = [{"depth": 60, "width": 6528}, {"grid": 512, "width": 6528}, {"num_classes": 10**12}]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sizes", [*HUGE, {"width": 65_536, "heads": 64}])
def test_a_network_that_does_not_fit_is_not_made(monkeypatch, name, sizes):
    monkeypatch.setattr("dcdit.network.registry.free_memory", lambda: 4 << 30)
    with pytest.raises(UserError, match=r"^model: .* has [\d,]+M parameters and takes [\d,.]+ GB, 4\.3 GB are free"):
        build_network({"name": name, **SMALL, **sizes})


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("key", ["mlp_ratio", "smoothing_sigma", "label_dropout", "depth", "grid", "num_classes"])
def test_no_number_is_endless(name, key):
    if key in annotations(NETWORKS[name]):
        with pytest.raises(UserError, match=rf"model\.{key}=(1e\+300|a number of 997 bits) is outside"):
            build_network({"name": name, **SMALL, key: 1e300})


@pytest.mark.parametrize("sizes", [*HUGE, {"encoder_width": 65_536}])
def test_a_checkpoint_of_a_network_larger_than_its_file_is_refused(trained_run, monkeypatch, sizes):
    last = trained_run / "checkpoints" / "last.ckpt"
    rewrite(last, lambda values: values["hyper_parameters"]["model"].update(sizes))
    monkeypatch.setattr("dcdit.network.registry.free_memory", lambda: 0)  # nothing is made
    with pytest.raises(UserError, match=r"the network that is described needs|does not divide|is not"):
        load_model(last)


def test_a_folder_of_a_network_larger_than_its_file_is_refused(tmp_path, monkeypatch):
    network = build_network({"name": "dit", **SMALL})
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["network"]["depth"] = 50
    sign(tmp_path / "config.json", **config)
    monkeypatch.setattr("dcdit.network.registry.free_memory", lambda: 0)
    with pytest.raises(UserError, match=r"parameter blocks\.1\..* has shape none"):
        DiT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("text", ["\ud800", "a\0b"])
@pytest.mark.parametrize("key", ["classes", "autoencoder"])
def test_names_are_text(key, text):
    names = ["a", text] if key == "classes" else text
    values = {"shape": [4, 8, 8], "autoencoder": "x", "scale": 1.0, "shift": 0.0, "classes": ["a"], key: names}
    with pytest.raises(UserError, match=rf"latents\.{key}=.* (is not a text without|holds a) null byte") as error:
        LatentSpec.from_plain(values, "latents")
    str(error.value).encode()
