"""Quality against compute, as users measure it."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.configs import PLAIN_DIT, call, compose_config
from support.features import CORNERS, Corners, archive_arrays
from support.hub import offline
from support.processes import Command, end, ranks

from dcdit import evaluate, generate
from dcdit.checkpoints.resolve import SHIPPED
from dcdit.errors import UserError
from dcdit.evaluation.descriptions import differences_from_published
from dcdit.evaluation.features import DigitsClassifier, FeatureNetwork
from dcdit.evaluation.measure import Deadline, Measurement
from dcdit.evaluation.metrics import compare
from dcdit.evaluation.results import read_result
from dcdit.evaluation.statistics import Statistics

SETTINGS = ("features=digits", "count=44", "chunk_size=15", "sampler.steps=3", "sampler.clip=true", "batch_size=5")


@pytest.fixture
def run(trained_run, tmp_path, digits):
    """Evaluate a network of three steps; returns the results by drop fraction."""
    checkpoint = trained_run / "checkpoints" / "last.ckpt"

    def to(*overrides: str, out: str | None = None) -> dict[float, dict]:
        places = [f"checkpoint={checkpoint}", f"reference={digits}/val", f"cache={tmp_path}/cache"]
        places += [f"out={tmp_path / out}"] if out else []
        measured = call(evaluate, compose_config(*places, *SETTINGS, *overrides, name="evaluate"))
        results = [json.loads(result.path.read_text()) for result in measured]
        return {result["plan"]["guidance"]["drop_fraction"]: result for result in results}

    to.checkpoint = checkpoint
    return to


def test_figures_stand_beside_what_they_depend_on(run, capsys, tmp_path):
    results = run("drop_fractions=[0,0.5]", "guidance.scale=2", "guidance.uncond_drop_fraction=0.7")
    assert set(results) == {0.0, 0.5}
    result = results[0.5]
    assert result["run"] == "trained"
    assert set(result["metrics"]) == {
        *("fid", "kid", "kid_std", "kid_subset", "inception_score", "inception_score_std", "precision", "recall")
    }
    plan = result["plan"]
    assert (plan["step"], plan["weights"], plan["precision"], plan["count"]) == (3, "ema", "fp32", 44)
    assert (plan["sampler"]["steps"], plan["guidance"]["scale"]) == (3, 2.0)
    assert plan["features"]["name"] == "digits classifier"
    assert plan["autoencoder"] == "identity"
    assert plan["reference"]["count"] == 180
    assert result["training"]["compression"] == 4.0
    assert result["training"]["ema"] == {"decay": 0.98, "warmup": False}
    assert result["tflops_per_image"] <= results[0.0]["tflops_per_image"]
    timing = result["timing"]
    assert (len(timing["rounds"]), timing["batch_size"]) == (3, 5)
    assert result["milliseconds_per_image"] == sorted(timing["rounds"])[1] > 0
    kept = result["keep_ratio"]
    assert kept["timesteps"] == [999, 500, 0]
    assert len(kept["main"]) == len(kept["guiding"]) == 3
    assert all(0 < share <= 1 for share in kept["main"])
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
    folder = call(generate, compose_config(*places, *settings, name="generate"))
    network = DigitsClassifier()
    with np.load(folder / "samples.npz") as stored:
        seen = network(torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2))
    from dcdit.data.builtin import Digits as Source

    images, _ = Source(grid=8).images()
    order = np.random.default_rng(0).permutation(len(images))[:180]
    real = network(((images[order].half().float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8))
    expected = compare(Statistics.of([real], 180), lambda: iter([seen]), ["fid", "kid", "is", "prc"])
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
    for drop in (0, 0.4):  # other batches round the classifier's float32 features otherwise
        assert shared[drop]["metrics"] == pytest.approx(whole[drop]["metrics"], rel=1e-5)
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
    assert again[0.4]["metrics"] == pytest.approx(whole[0.4]["metrics"], rel=1e-5)
    assert again[0.4]["keep_ratio"]["main"] == pytest.approx(whole[0.4]["keep_ratio"]["main"], rel=1e-5)


def test_two_processes_at_once(run, tmp_path, digits):
    """A search, in whose rounds each waits for the other."""
    places = (f"checkpoint={run.checkpoint}", f"reference={digits}/val", f"cache={tmp_path}/cache")
    words = ("search=true", "guidance.scale=[1,2]", "time_rounds=1")
    end(ranks(2, tmp_path, "evaluate", *places, *SETTINGS, *words, f"out={tmp_path}/two"))
    run(*words, out="one")
    logs = [(tmp_path / name / "search.log").read_text() for name in ("one", "two")]
    assert logs[0] == logs[1]
    assert logs[0].count("round") == 3
    results = {}
    for name in ("one", "two"):
        for path in (tmp_path / name).glob("[!.]*.json"):
            results.setdefault(path.name, []).append(json.loads(path.read_text())["metrics"])
    assert len(results) >= 4
    for alone, shared in results.values():
        # the classifier sees other batches, which rounds its float32 features otherwise
        assert shared == pytest.approx(alone, rel=1e-5)


def test_the_same_command_twice_at_once(run, tmp_path, digits):
    """Neither command knows of the other: each means to do all, and both end well."""
    words = (f"checkpoint={run.checkpoint}", *SETTINGS[3:], "features=digits", "count=60", "chunk_size=6")
    measured = (f"reference={digits}/val", f"cache={tmp_path}/cache", "metrics=[fid]", "time_rounds=0")
    commands = [Command(tmp_path, "evaluate", *words, *measured, f"out={tmp_path}/two") for _ in range(2)]
    commands += [Command(tmp_path, "generate", *words[:-3], "count=60", "chunk_size=6", "out=images") for _ in range(2)]
    end(commands)
    assert {path.suffix for path in (tmp_path / "two").iterdir() if path.name[0] != "."} == {".json", ".png"}
    assert sorted(os.listdir(tmp_path / "images")) == [".generation.lock", "samples.json", "samples.npz"]


def test_a_reference_is_checked_before_a_checkpoint_is_downloaded(run, monkeypatch, tmp_path):
    monkeypatch.setattr("dcdit.checkpoints.resolve.resolve_checkpoint", lambda *ignored: pytest.fail("resolved"))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((3, 8, 8, 3)))
    with pytest.raises(UserError, match=r"reference=.*floats.npz: arr_0 is float64"):
        run(f"reference={tmp_path}/floats.npz")


def test_mistakes_end_before_anything_is_drawn(run, tmp_path, digits, tiny):
    for override, message in (
        ("checkpoint=nowhere", "nowhere does not exist"),
        (f"checkpoint={digits}/val/manifest.json", "cannot be read safely"),
        ("reference=nowhere", "reference=nowhere does not exist"),
        (f"reference={digits}", "holds several splits"),
        ("count=1", "1 image is too few for FID"),
        ("count=0", "count=0 is not a positive number"),
        ("drop_fractions=[0,1.1]", r"drop_fractions=1.1 is outside"),
        ("drop_fractions=[]", "asks for nothing"),
        ("metrics=[fids]", "'fids' is not one of"),
        ("metrics=[sfid]", "no sFID without spatial features, which digits classifier has not"),
        ("guidance.drop_fraction=[0,0.3]", r"is a list: give several as drop_fractions=\[0,0.3\]"),
        ("labels=[random,balanced]", r"labels=\[.*\] is a list: one value is wanted here"),
        ("guidance.scale=[]", "guidance.scale=\\[\\] asks for nothing"),
        ("guidance.scale=[1,many]", "guidance.scale='many' is not a number"),
        ("weights=[ema,best]", "weights='best' is not one of ema, raw"),
        ("uncond_drop_fractions=[1.1]", r"uncond_drop_fractions=1.1 is outside"),
        ("max_images=40", "max_images=40 is less than one measurement takes, count=44"),
        ("max_hours=0", "max_hours=0 is not positive"),
        ("search=true", "search=true looks between two scales at least"),
        ("drop_fractions=0.3", r"a list is needed, such as drop_fractions=\[0.3\]"),
        ("features=own", r"features.module._target_ is not set: give features.module._target_="),
        ("time_rounds=-1", "time_rounds=-1 is outside"),
        ("shown=101", "shown=101 is outside"),
        ("autoencoder=/nowhere/vae", "cannot be loaded"),
        ("+cuont=3", "did you mean count"),
        ("reference_count=0", "reference_count=0 is not a positive number"),
    ):
        with pytest.raises(UserError, match=message):
            run(override, out="wrong")
    for other in ("guidance.drop_fraction=0.2", "budget.fraction=0.9"):
        with pytest.raises(UserError, match="the budget is given by budget"):
            run("drop_fractions=[0.1]", other, out="wrong")
    with pytest.raises(
        UserError,
        match=r"features.module._target_=nowhere.MyNet cannot be imported .No module named 'nowhere'.: .* PYTHONPATH",
    ):
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


def remedies(message: str) -> list[str]:
    """The overrides that a message prints, with something in the place of the dots."""
    return [word.replace("...", "x").strip("',.:") for word in re.findall(r"[\w@.+]+=[\w/.]+", message)]


@pytest.mark.parametrize(
    ("group", "given"),
    [
        ("inception", []),
        ("inception", ["features.weights=no.pt"]),
        ("own", []),
        ("timm", ["features.model=test_resnet.r160_in1k"]),
    ],
)
def test_remedies_are_keys_of_the_command_that_prints_them(run, tiny, monkeypatch, group, given):
    def unreachable(*ignored, **options):
        raise OSError("unreachable")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    inside = [word.replace("features.", "callbacks.fid.features.") for word in given]
    chosen, fid = f"features={group}", ["callbacks=fid", f"features@callbacks.fid.features={group}"]
    with offline():
        with pytest.raises(UserError) as evaluating:
            run(chosen, *given)
        with pytest.raises(UserError) as training:
            tiny("run", *fid, *inside)
    for refused, before, name in ((evaluating, [chosen], "evaluate"), (training, fid, "train")):
        words = remedies(str(refused.value))
        assert words
        for word in words:
            compose_config(*before, word, name=name)


def test_a_reference_that_is_not_there_is_told_before_anything_is_loaded(run, tmp_path, monkeypatch):
    for name in ("sampling.setup.set_up_all", "evaluation.points.build_features"):
        monkeypatch.setattr(f"dcdit.{name}", lambda *ignored: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"reference=nope.npz does not exist"):
        run("reference=nope.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match=r"pipe.npz is neither a folder nor a file"):
        run(f"reference={tmp_path}/pipe.npz")
    monkeypatch.undo()
    monkeypatch.setattr("dcdit.evaluation.points.build_features", lambda *ignored: pytest.fail("loaded"))
    (tmp_path / "small.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"small.npz is damaged"):
        run(f"reference={tmp_path}/small.npz", "features=inception")


GRID = ("guidance.scale=[1,2]", "uncond_drop_fractions=[0,0.5]", "guidance.weak=[uncond,budget]")
ALL = (*CORNERS, "features.archive_statistics=true", "count=24", "metrics=[fid,sfid,kid,is,prc]")


@pytest.fixture
def archive(tmp_path, digits):
    """A look-alike of the ADM suite's reference archive."""
    random = np.random.default_rng(0)
    images = random.integers(256, size=(40, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", arr_0=images, **archive_arrays())
    return tmp_path / "VIRTUAL_imagenet256_labeled.npz"


@pytest.fixture
def measured(run, archive):
    """Evaluate the digits that come along, with all metrics, against the archive; returns results by their points."""

    def to(*overrides: str, out: str) -> dict[tuple, dict]:
        run(f"reference={archive}", "checkpoint=digits", f"paths.runs={archive.parent}", *ALL, *overrides, out=out)
        results = [json.loads(file.read_text()) for file in (archive.parent / out).glob("[!.]*.json")]
        return {point(result["plan"]): result for result in results}

    return to


def point(plan):
    guidance = plan["guidance"]
    scale, weak = guidance["scale"], guidance["weak"] if guidance["scale"] != 1 else None
    return plan["weights"], scale, weak, guidance["drop_fraction"], guidance["uncond_drop_fraction"]


def test_a_grid_is_what_its_points_are_alone(measured, capsys):
    found = measured(*GRID, "drop_fractions=[0,0.2]", out="grid")
    expected = {("ema", 1.0, None, drop, None) for drop in (0.0, 0.2)}
    expected |= {("ema", 2.0, "uncond", drop, rho) for drop in (0.0, 0.2) for rho in (0.0, 0.5)}
    expected |= {("ema", 2.0, "budget", drop, 0.5) for drop in (0.0, 0.2)}
    assert set(found) == expected
    shown = capsys.readouterr().out
    assert (
        "Left out: guidance.weak=budget, drop fraction 0.2, of the guiding branch 0: the guiding branch would be"
        in shown
    )
    assert shown.count("Best at its budget: FID") == 6
    assert shown.count("Best of all: FID") == 1
    some = (("ema", 1.0, None, 0.2, None), ("ema", 2.0, "budget", 0.2, 0.5), ("ema", 2.0, "uncond", 0.0, 0.5))
    for number, key in enumerate(some):
        _, scale, weak, drop, rho = key
        values = {"scale": scale, "weak": weak or "null", "drop_fraction": drop, "uncond_drop_fraction": rho or "null"}
        (alone,) = measured(
            *(f"guidance.{name}={value}" for name, value in values.items()), out=f"alone{number}"
        ).values()
        for name in ("metrics", "plan", "keep_ratio", "tflops_per_image"):
            assert alone[name] == found[key][name]
    results = {key: result["metrics"]["fid"] for key, result in found.items()}
    assert len(set(results.values())) == len(results)


def test_caching_is_an_axis_of_a_grid(run, archive, tmp_path, capsys):
    place = (f"reference={archive}", "checkpoint=digits", f"paths.runs={tmp_path}", "metrics=[kid]")
    run(*place, "sampler=ddim", "sampler.steps=10", "sampler.cache=[0,1]", out="x")
    results = [json.loads(file.read_text()) for file in (tmp_path / "x").glob("[!.]*.json")]
    whole, cached = sorted(results, key=lambda result: result["plan"]["sampler"]["cache"])
    assert [result["plan"]["sampler"]["cache"] for result in (whole, cached)] == [0.0, 1.0]
    assert cached["tflops_per_image"] < 0.9 * whole["tflops_per_image"]
    assert cached["keep_ratio"]["mean"] < 0.9 * whole["keep_ratio"]["mean"]
    shown = capsys.readouterr().out
    assert "ema weights, ρ 0, cache 1" in shown
    assert "of those that reused features none was kept" in shown


def test_both_kinds_of_weights(run, tmp_path):
    run("weights=[ema,raw]", out="both")
    results = [json.loads(file.read_text()) for file in (tmp_path / "both").glob("[!.]*.json")]
    ema, raw = sorted(results, key=lambda result: result["plan"]["weights"])
    assert (ema["plan"]["weights"], raw["plan"]["weights"]) == ("ema", "raw")
    assert ema["plan"]["checkpoint"] != raw["plan"]["checkpoint"]


def test_the_published_way_as_the_documentation_types_it(run, archive, monkeypatch):
    """All figures of an archive with mu, sigma, mu_s and sigma_s by independent computations."""
    from scipy.linalg import sqrtm

    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (command,) = re.findall(
        r"python -m dcdit.evaluate (checkpoint=\S+ reference=VIRTUAL\S+ precision=\S+)$", page, re.MULTILINE
    )
    monkeypatch.chdir(archive.parent)
    (archive.parent / "runs").mkdir()
    (archive.parent / "runs" / "b_n4").symlink_to(SHIPPED["digits"])
    config = compose_config(*command.split(), *SETTINGS, *ALL, "cache=cache", "metrics=null", name="evaluate")
    (measured,) = call(evaluate, config)
    result = json.loads(measured.path.read_text())
    assert result["plan"]["reference"]["published"] == ["features", "spatial"]
    assert result["plan"]["labels"] == "random"
    assert differences_from_published(read_result(measured.path).plan) == [
        *("24 images instead of 50,000", "features of Corners instead of inception-v3-compat"),
        "precision and recall against 40 images instead of 10,000",
    ]
    folder = call(generate, compose_config(command.split()[0], "out=out", "count=24", *SETTINGS[2:], name="generate"))
    with np.load(folder / "samples.npz") as stored, np.load(archive) as reference:
        seen = [x.double().numpy() for x in Corners()(torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2))]
        real = Corners()(torch.from_numpy(reference["arr_0"]).permute(0, 3, 1, 2))[0].double().numpy()
        for key, features, suffix in (("fid", seen[0], ""), ("sfid", seen[2], "_s")):
            mu, sigma = reference[f"mu{suffix}"], reference[f"sigma{suffix}"]
            nu, tau = features.mean(0), np.cov(features.T)
            expected = ((mu - nu) ** 2).sum() + np.trace(sigma + tau - 2 * sqrtm(sigma @ tau).real)
            assert result["metrics"][key] == pytest.approx(expected, rel=1e-6)

    def inside(points, centres):
        radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=2), axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres, axis=2) <= radii).any(axis=1).mean()

    assert result["metrics"]["precision"] == pytest.approx(inside(seen[0], real))
    assert result["metrics"]["recall"] == pytest.approx(inside(real, seen[0]))
    probabilities = np.exp(seen[1]) / np.exp(seen[1]).sum(1, keepdims=True)
    whole = np.exp((probabilities * np.log(probabilities / probabilities.mean(0))).sum(1).mean())
    assert result["metrics"]["inception_score"] == pytest.approx(whole, rel=0.1)  # of ten splits of a few images


def test_a_grid_on_two_processes_after_a_kill_and_in_any_batches(measured, monkeypatch, capsys):
    points = ("guidance.scale=[1,2]", "uncond_drop_fractions=[0.5]", "guidance.weak=[uncond,budget]", "chunk_size=7")
    whole = measured(*points, out="whole")
    assert len(whole) == 3
    for rank in (1, 0):
        monkeypatch.setattr(evaluate, "processes", lambda rank=rank: (rank, 2))
        two = measured(*points, "cache=null", out="two")
    monkeypatch.undo()
    calls, forward = [], FeatureNetwork.forward

    def breaks(self, images):
        calls.append(1)
        if len(calls) > 9:  # in the second point
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(FeatureNetwork, "forward", breaks)
    with pytest.raises(KeyboardInterrupt):
        measured(*points, out="broken")
    monkeypatch.undo()
    again = measured(*points, out="broken")
    same = ("metrics", "tflops_per_image", "keep_ratio")
    for other in (two, again):
        assert set(other) == set(whole)
        for key, each in other.items():
            assert [each[name] for name in same] == [whole[key][name] for name in same]
    for size in (1, 7, 64):
        batches = measured(*points, f"batch_size={size}", out=f"batch{size}")
        for key, each in batches.items():
            assert each["metrics"] == pytest.approx(whole[key]["metrics"], rel=1e-4, abs=1e-6)


def test_limits_of_images_and_of_time(measured, archive, capsys, monkeypatch):
    found = measured(*GRID, "max_images=60", out="few")
    assert set(found) == {("ema", 1.0, None, 0.0, None), ("ema", 2.0, "uncond", 0.0, 0.0)}
    assert "max_images=60 leaves 2 of the points out" in capsys.readouterr().out
    found = measured(*GRID, "max_hours=1e-9", "chunk_size=7", out="late")
    assert not found
    assert "Not all is measured, max_hours is over" in capsys.readouterr().out
    timed = []

    def time_batch(self):
        timed.append(self)
        monkeypatch.setattr(Deadline, "over", property(lambda self: True))
        return 1.0

    monkeypatch.setattr(Measurement, "time_batch", time_batch)  # the time is over while the first of them is timed
    assert len(measured(*GRID, "chunk_size=7", "time_rounds=3", out="late")) == 4
    monkeypatch.undo()
    assert len(timed) == 1
    assert "max_hours is over while timing" in capsys.readouterr().out
    assert len(measured(*GRID, "chunk_size=7", "time_rounds=1", out="late")) == 4
    results = [json.loads(path.read_text()) for path in (archive.parent / "late").glob("[!.]*.json")]
    assert all(len(values["timing"]["rounds"]) == 1 for values in results)


def test_a_search_takes_few_images_first_and_more_near_the_best(measured, archive, capsys, monkeypatch):
    """FID is made a parabola with its least at 2.2: the rounds close in on it."""

    def parabola(reference, chunks, wanted, seed=0):
        return {"fid": (current[0] - 2.2) ** 2 + 1.0}

    current, finalize = [], Measurement.finalize

    def remember(self):
        current[:] = [self.sampling.guidance.settings.scale]
        return finalize(self)

    monkeypatch.setattr("dcdit.evaluation.measure.compare", parabola)
    monkeypatch.setattr(Measurement, "finalize", remember)
    words = ("search=true", "guidance.scale=[1,2,3,4]", "uncond_drop_fractions=[0.5]", "metrics=[fid]", "count=120")
    measured(*words, "chunk_size=60", out="searched")
    log = (archive.parent / "searched" / "search.log").read_text().splitlines()
    budget = "ema weights, ρ 0, guiding branch: no class at ρ 0.5: "
    assert log == [
        budget + "round 1, 12 images, FID at scale 1 -> 2.44, 2 -> 1.04, 3 -> 1.64, 4 -> 4.24; best 2",
        budget + "round 2, 40 images, FID at scale 1.5 -> 1.49, 2 -> 1.04, 2.5 -> 1.09; best 2",
        budget + "round 3, 120 images, FID at scale 1.75 -> 1.203, 2 -> 1.04, 2.25 -> 1.002; best 2.25",
        # 2.25 is the end of what all images have seen: its neighbour too
        budget + "round 4, 120 images, FID at scale 1.75 -> 1.203, 2 -> 1.04, 2.25 -> 1.002, 2.5 -> 1.09; best 2.25",
    ]
    plans = [json.loads(file.read_text())["plan"] for file in (archive.parent / "searched").glob("[!.]*.json")]
    assert {plan["guidance"]["scale"] for plan in plans if plan["count"] == 120} == {1.75, 2.0, 2.25, 2.5}
    assert len(plans) == 11
    # the same command measures nothing anew; less is stopped in words
    monkeypatch.setattr(FeatureNetwork, "forward", lambda *call: pytest.fail("measured again"))
    measured(*words, "chunk_size=60", "time_rounds=0", out="searched")
    assert (archive.parent / "searched" / "search.log").read_text().splitlines() == log
    monkeypatch.undo()
    measured(*words, "max_images=100", out="stopped")
    shown = capsys.readouterr().out
    assert "round 2 would exceed max_images=100: raise it to go on from here" in shown
    assert "by other processes" not in shown
    monkeypatch.setattr("dcdit.evaluation.measure.compare", parabola)
    monkeypatch.setattr(Measurement, "finalize", remember)
    measured(*words[:1], "guidance.scale=[2.5,3]", "metrics=[fid]", "count=20", "chunk_size=60", out="edge")
    assert "guidance 2.5 is the end of the scales that were given: look beyond it too" in capsys.readouterr().out


def test_weak_checkpoints(measured, tiny, trained_run, tmp_path):
    """Autoguidance by another, smaller network; both counted, the weak one told by its weights."""
    other = tiny("weak", "trainer.max_steps=2", "model.grid=16", f"data.directory={tmp_path}/digits16")
    place = f"guidance.weak_checkpoint={other}/checkpoints/last.ckpt"
    (found,) = measured("guidance.scale=2", place, out="guided").values()
    (lite,) = measured("guidance.scale=2", out="lite").values()
    guidance = found["plan"]["guidance"]
    assert guidance["weak"] == "budget"
    assert re.fullmatch(r".*/weak/checkpoints/last.ckpt [0-9a-f]{16}", guidance["weak_checkpoint"])
    assert found["tflops_per_image"] < lite["tflops_per_image"]
    assert found["metrics"] != lite["metrics"]
    with pytest.raises(UserError, match=r"weak_checkpoint=digits holds the weights that it should guide"):
        measured("guidance.scale=2", "guidance.weak_checkpoint=digits", out="wrong")
    with pytest.raises(UserError, match=r"guidance.weak_checkpoint=nowhere does not exist"):
        measured("guidance.scale=2", "guidance.weak_checkpoint=nowhere", out="wrong")
    place = f"guidance.weak_checkpoint={trained_run}/checkpoints/last.ckpt"
    with pytest.raises(UserError, match=r"latents of shape \(1, 8, 8\), the checkpoint \(1, 16, 16\)"):
        measured("guidance.scale=2", place, out="wrong")


def test_a_capacity_is_part_of_a_result_and_what_had_no_room_is_noted(run, tmp_path, capsys):
    stored = torch.load(run.checkpoint, weights_only=True)
    stored["state_dict"]["network.router.scorer.3.bias"].zero_()  # a fresh router keeps next to nothing
    torch.save(stored, run.checkpoint)
    settings = ("metrics=[fid]", "time_rounds=0", "batch_size=8", "chunk_size=16")
    exact = run(*settings, out="results")[0.0]
    assert not {"capacity", "dropped_by_capacity"} & {*exact, *exact["plan"]}
    assert "no room" not in capsys.readouterr().out
    bounded = run(*settings, "capacity=0.3", out="results")[0.0]
    shown = " ".join(capsys.readouterr().out.split())
    assert bounded["plan"] == {**exact["plan"], "capacity": 0.3}
    assert 0 < bounded["dropped_by_capacity"]["share"] < 1
    assert shown.count("At 1 of 1 points, at the worst of them capacity=0.3: ") == 1
    run(*settings, "capacity=0.3", "chunk_size=12", out="results")  # other batches share the room
    files = list((tmp_path / "results").glob("*.json"))
    assert len(files) == 3
    for file in files:
        assert read_result(file).as_plain() == json.loads(file.read_text())
