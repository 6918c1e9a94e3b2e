"""Quality against compute, as users measure it."""

import json

import numpy as np
import pytest
import torch
from support.configs import PLAIN_DIT, compose_config
from support.processes import end, ranks

from dcdit import evaluate, generate
from dcdit.errors import UserError
from dcdit.evaluation.features import DigitsClassifier, FeatureNetwork
from dcdit.evaluation.metrics import compare
from dcdit.evaluation.statistics import Statistics

SETTINGS = ("features=digits", "count=44", "chunk_size=15", "sampler.steps=3", "sampler.clip=true", "batch_size=5")


@pytest.fixture
def run(trained_run, tmp_path, digits):
    """Evaluate a network of three steps; returns the results by drop fraction."""
    checkpoint = trained_run / "checkpoints" / "last.ckpt"

    def to(*overrides: str, out: str | None = None) -> dict[float, dict]:
        places = [f"checkpoint={checkpoint}", f"reference={digits}/val", f"cache={tmp_path}/cache"]
        places += [f"out={tmp_path / out}"] if out else []
        files = evaluate.run(compose_config(*places, *SETTINGS, *overrides, name="evaluate"))
        results = [json.loads(file.read_text()) for file in files]
        return {result["plan"]["guidance"]["drop_fraction"]: result for result in results}

    to.checkpoint = checkpoint
    return to


def test_figures_stand_beside_what_they_depend_on(run, capsys, tmp_path):
    results = run("drop_fractions=[0,0.5]", "guidance.scale=2", "guidance.uncond_drop_fraction=0.7")
    assert set(results) == {0.0, 0.5}
    result = results[0.5]
    assert result["run"] == "trained"
    assert set(result["metrics"]) == {
        *("fid_torch", "kid", "kid_std", "kid_subset", "inception_score", "inception_score_std")
    }
    plan = result["plan"]
    assert (plan["step"], plan["weights"], plan["precision"], plan["count"]) == (3, "ema", "fp32", 44)
    assert (plan["sampler"]["steps"], plan["guidance"]["scale"]) == (3, 2.0)
    assert plan["features"]["name"] == "digits classifier"
    assert plan["autoencoder"] == "identity"
    assert plan["reference"]["count"] == 180
    assert result["training"]["compression"] == 4.0
    assert result["tflops_per_image"] <= results[0.0]["tflops_per_image"]
    timing = result["timing"]
    assert (len(timing["rounds"]), timing["batch_size"]) == (3, 5)
    assert result["milliseconds_per_image"] == sorted(timing["rounds"])[1] > 0
    kept = result["keep_ratio"]
    assert kept["timesteps"] == [999, 500, 0]
    assert len(kept["conditional"]) == len(kept["unconditional"]) == 3
    assert all(0 < share <= 1 for share in kept["conditional"])
    shown = capsys.readouterr().out
    for word in ("FID", "KID", "IS", "TFLOPs", "ms/image", "digits classifier", "guidance 2"):
        assert word in shown
    # finished points are not measured again; a new budget is added to them
    folder = run.checkpoint.parents[1] / "evaluation"
    before = {path: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert len(before) == 2
    run("drop_fractions=[0,0.2,0.5]", "guidance.scale=2", "guidance.uncond_drop_fraction=0.7")
    after = {path: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert len(after) == 3
    for path, values in before.items():  # the times are taken again, for all budgets in turns
        same = ("metrics", "plan", "keep_ratio", "tflops_per_image")
        assert [values[key] for key in same] == [after[path][key] for key in same]
        assert values["timing"] != after[path]["timing"]
    untouched = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    run("drop_fractions=[0,0.2,0.5]", "guidance.scale=2", "guidance.uncond_drop_fraction=0.7")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.json")} == untouched
    assert {path.suffix for path in folder.glob("[!.]*")} == {".json", ".png"}
    assert not [path for path in folder.glob(".*") if path.is_dir()]


def test_the_figures_are_those_of_the_images_that_generate_writes(run, tmp_path, digits):
    result = run()[0.0]
    places = (f"checkpoint={run.checkpoint}", f"out={tmp_path}/images")
    settings = ("count=44", "chunk_size=15", "sampler.steps=3", "sampler.clip=true", "batch_size=5")
    folder = generate.run(compose_config(*places, *settings, name="generate"))
    network = DigitsClassifier()
    with np.load(folder / "samples.npz") as stored:
        seen = network(torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2))
    from dcdit.data.builtin import Digits as Source

    images, _ = Source(grid=8).images()
    order = np.random.default_rng(0).permutation(len(images))[:180]
    real = network(((images[order].half().float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)).features
    expected = compare(Statistics.of([real], 180), lambda: iter([seen]), ["fid", "kid", "is"])
    assert result["metrics"] == pytest.approx(expected, rel=1e-4)
    # a reference in another form is the same reference
    np.savez(tmp_path / "real.npz", arr_0=_rgb(images[order]))
    other = run(f"reference={tmp_path}/real.npz")[0.0]
    assert other["metrics"] == pytest.approx(expected, rel=1e-4)


def _rgb(images):
    grey = ((images.half().float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
    return grey.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def test_any_number_of_processes_and_any_break_give_the_same_figures(run, monkeypatch, capsys):
    whole = run("drop_fractions=[0,0.4]", out="whole")
    for rank in (1, 0):
        monkeypatch.setattr(evaluate, "processes", lambda rank=rank: (rank, 2))
        shared = run("drop_fractions=[0,0.4]", "cache=null", out="two")
        assert (len(shared) == 2) == (rank == 0)
    monkeypatch.undo()
    assert {drop: result["metrics"] for drop, result in shared.items()} == {
        drop: result["metrics"] for drop, result in whole.items()
    }
    calls, see = [], FeatureNetwork.forward

    def breaks(self, images):
        calls.append(1)
        if len(calls) > 13:  # in the second budget
            raise OSError(28, "No space left on device")
        return see(self, images)

    monkeypatch.setattr(FeatureNetwork, "forward", breaks)
    with pytest.raises(UserError, match=r"No space left on device. Finished chunks are kept"):
        run("drop_fractions=[0,0.4]", out="broken")
    monkeypatch.undo()
    capsys.readouterr()
    again = run("drop_fractions=[0,0.4]", out="broken")
    assert "Continuing: 1 of 3 chunks" in capsys.readouterr().err
    assert again[0.4]["metrics"] == whole[0.4]["metrics"]
    assert again[0.4]["keep_ratio"] == whole[0.4]["keep_ratio"]


def test_two_processes_at_once(run, tmp_path, digits):
    places = (f"checkpoint={run.checkpoint}", f"reference={digits}/val", f"cache={tmp_path}/cache")
    settings = (*SETTINGS, "drop_fractions=[0,0.5]", f"out={tmp_path}/two")
    end(ranks(2, tmp_path, "evaluate", *places, *settings))
    two = [json.loads(path.read_text()) for path in sorted((tmp_path / "two").glob("*.json"))]
    one = [result for _, result in sorted(run("drop_fractions=[0,0.5]", out="one").items())]
    two.sort(key=lambda each: each["plan"]["guidance"]["drop_fraction"])
    for shared, alone in zip(two, one, strict=True):
        # the classifier sees other batches, which rounds its float32 features otherwise
        assert shared["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)


def test_mistakes_end_before_anything_is_drawn(run, tmp_path, digits, tiny):
    for override, message in (
        ("checkpoint=nowhere", "nowhere does not exist"),
        (f"checkpoint={digits}/val/manifest.json", "cannot be read safely"),
        ("reference=nowhere", "reference=nowhere does not exist"),
        (f"reference={digits}", "holds several splits"),
        ("count=30", "30 images are too few for FID"),
        ("count=0", "count=0 is not a positive number"),
        ("drop_fractions=[0,1.0]", r"drop_fractions=1 is outside"),
        ("drop_fractions=[]", "asks for nothing"),
        ("metrics=[prc]", "'prc' is not one of"),
        ("drop_fractions=0.3", r"a list is needed, such as drop_fractions=\[0.3\]"),
        ("features=own", r"features.module._target_ is not set: give features.module._target_="),
        ("time_rounds=-1", "time_rounds=-1 is negative"),
        ("autoencoder=/nowhere/vae", "cannot be loaded"),
        ("+cuont=3", "did you mean count"),
        ("reference_count=0", "reference_count=0 is not a positive number"),
    ):
        with pytest.raises(UserError, match=message):
            run(override, out="wrong")
    for other in ("guidance.drop_fraction=0.2", "budget.fraction=0.9"):
        with pytest.raises(UserError, match="the budget is given by budget"):
            run("drop_fractions=[0.1]", other, out="wrong")
    with pytest.raises(UserError, match=r"features: .*nowhere.MyNet.*No module named 'nowhere'"):
        run("features=own", "features.module._target_=nowhere.MyNet", out="wrong")
    with pytest.raises(UserError, match="holds no checkpoint"):
        run(f"checkpoint={tmp_path}", out="wrong")
    assert not (tmp_path / "wrong").exists()
    baseline = tiny("dit", *PLAIN_DIT, "trainer.max_steps=2")
    checkpoint = f"checkpoint={baseline}/checkpoints/last.ckpt"
    with pytest.raises(UserError, match="DiT/2 drops no tokens"):
        run(checkpoint, "drop_fractions=[0,0.2]", out="wrong")
    with pytest.raises(UserError, match="DiT/2 drops no tokens"):
        run(checkpoint, "guidance.drop_fraction=0.2", out="wrong")
    (result,) = run(checkpoint, "drop_fractions=[0]", out="dit").values()
    assert "keep_ratio" not in result
