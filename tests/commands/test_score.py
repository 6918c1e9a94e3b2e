"""Scores of images that exist, as users ask for them."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import typed
from support.configs import call, compose_config
from support.features import CORNERS, Corners, archive_arrays
from support.plugins import forgotten
from support.processes import end, ranks

from dcdit import evaluate, generate, report, score
from dcdit.errors import UserError
from dcdit.evaluation.descriptions import differences_from_published
from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.scores import SamplingRecord, read_score
from dcdit.settings.plugins import load_plugins

SAMPLING = ("sampler.steps=3", "sampler.clip=true", "batch_size=5", "count=44", "guidance.scale=1.5")


@pytest.fixture(scope="module")
def generated(three_steps, tmp_path_factory):
    """What dcdit.generate makes of a network of three steps."""
    folder = tmp_path_factory.mktemp("generated")
    places = (f"checkpoint={three_steps}/checkpoints/last.ckpt", f"out={folder}")
    return call(generate, compose_config(*places, *SAMPLING, "png=true", name="generate"))


@pytest.fixture
def run(tmp_path, digits, generated):
    def scored(*words, images=generated / "samples.npz", reference=digits / "val", out="scores"):
        places = (f"images={images}", f"reference={reference}", f"out={tmp_path / out}", f"cache={tmp_path}/cache")
        return call(score, compose_config(*places, "features=digits", "chunk_size=15", *words, name="score"))

    return scored


def test_a_score_is_what_evaluate_measures_of_the_same_images(run, three_steps, digits, tmp_path, generated, capsys):
    checkpoint = f"checkpoint={three_steps}/checkpoints/last.ckpt"
    places = (checkpoint, f"reference={digits}/val", f"cache={tmp_path}/cache", f"out={tmp_path}/evaluation")
    words = (*SAMPLING, "features=digits", "chunk_size=15", "time_rounds=0")
    (measured,) = call(evaluate, compose_config(*places, *words, name="evaluate"))
    capsys.readouterr()
    found = run()
    assert found.metrics == pytest.approx(measured.metrics, rel=1e-5)  # batches of other sizes round otherwise
    assert len(found.metrics) == 8
    shown = capsys.readouterr().out
    # in the same words, with all that is known of the sampling
    assert differences_from_published(found.plan, found.sampled.plan) == differences_from_published(measured.plan)
    assert differences_from_published(measured.plan)[0] == "44 images instead of 50,000"
    assert found.sampled.plan.as_plain().items() <= measured.plan.as_plain().items()
    assert found.sampled.ema_decay == measured.ema_decay == 0.98
    for word in (
        "ema weights of decay 0.98",
        "ddpm 3 steps, x_0 clipped",
        "guidance 1.5",
        "FID ↓",
        "44 images instead",
    ):
        assert word in " ".join(shown.split()), word
    # PNGs of the same images in a folder are the same images, without what is known of them
    folder = run(images=generated / "png")
    assert folder.metrics == pytest.approx(found.metrics, rel=1e-5)
    assert folder.sampled is None
    assert "sampled in an unknown way" in " ".join(capsys.readouterr().out.split())


def test_shards_and_a_part_of_the_images_can_be_scored(run, digits, tmp_path):
    whole = run(images=digits / "val")
    assert whole.metrics["fid"] == pytest.approx(0, abs=1e-3)
    assert (whole.metrics["precision"], whole.metrics["recall"]) == (1, 1)
    assert whole.plan.count == 180
    from dcdit.evaluation.images import open_images

    pixels = open_images(str(digits / "val"), None, torch.device("cpu")).read([0, 45, 90, 134, 179])
    np.savez(tmp_path / "five.npz", arr_0=pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    part = run("count=5", "metrics=[prc,kid]", images=digits / "val")
    five = run("metrics=[prc,kid]", images=tmp_path / "five.npz")
    assert part.metrics == pytest.approx(five.metrics)


OWN = """
from typing import ClassVar

from dcdit.diffusion.settings import SAMPLERS
from dcdit.diffusion.settings.samplers import DDPM
from dcdit.evaluation.settings import METRICS, Figure, Metric


def largest(reference, chunks):
    return {"largest": float(max(chunk.features.max() for chunk in chunks()))}


class Own(DDPM):
    name: ClassVar[str] = "own"


METRICS["own"] = Metric((Figure("largest", "largest"),), largest, "features")
SAMPLERS["own"] = Own
"""


@pytest.mark.usefixtures("no_plugins")
def test_plugins_are_recorded_and_named_where_they_are_missing(run, three_steps, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_metric.py").write_text(OWN)
    with forgotten():
        load_plugins(["my_metric"])
        places = (f"checkpoint={three_steps}/checkpoints/last.ckpt", f"out={tmp_path}/own")
        images = call(generate, compose_config(*places, *SAMPLING, "sampler=ddpm", "sampler.name=own", name="generate"))
        found = run("metrics=[fid,own]", images=images / "samples.npz")
        assert read_score(found.path) == found
        assert found.sampled.plan.sampler.name == "own"
    assert json.loads((images / "samples.json").read_text())["plugins"] == {"my_metric": None}
    assert json.loads(found.path.read_text())["plugins"] == {"my_metric": None}
    missing = r"='own' was made by the plug-in my_metric, which is not loaded, .*plugins=\[my_metric\]"
    with pytest.raises(UserError, match=missing):
        read_score(found.path)
    with pytest.raises(UserError, match=missing):
        SamplingRecord.beside(images / "samples.npz", json.loads((images / "samples.json").read_text())["content"])
    ours = run()
    assert "plugins" not in json.loads(ours.path.read_text())


def test_any_break_and_any_number_of_processes_give_the_same_figures(run, monkeypatch, capsys):
    whole = run(out="whole")
    for rank in (1, 0):
        monkeypatch.setattr(score, "processes", lambda rank=rank: (rank, 2))
        shared = run("cache=null", out="two")
        assert (shared is None) == (rank == 1)
    monkeypatch.undo()
    assert shared.metrics == pytest.approx(whole.metrics, rel=1e-5)  # the reference in other batches
    calls, see = [], FeatureNetwork.forward

    def breaks(self, images):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return see(self, images)

    monkeypatch.setattr(FeatureNetwork, "forward", breaks)
    with pytest.raises(UserError, match=r"No space left on device. Finished chunks are kept"):
        run("batch_size=15", out="broken")
    monkeypatch.undo()
    capsys.readouterr()
    assert run("batch_size=15", out="broken").metrics == pytest.approx(whole.metrics, rel=1e-5)
    assert "Continuing: 2 of 3 chunks" in capsys.readouterr().err
    path = whole.path
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(FeatureNetwork, "forward", lambda *ignored: pytest.fail("scored again"))
    assert run(out="whole") == whole
    assert path.stat().st_mtime_ns == before


def test_every_metric_equals_an_independent_computation(run, tmp_path):
    """FID and sFID by eigenvalues, the Inception Score by its definition, KID and precision and recall by loops."""
    random = np.random.default_rng(0)
    images = random.integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
    real = random.integers(200, size=(50, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "fake.npz", arr_0=images)
    np.savez(tmp_path / "real.npz", arr_0=real)
    found = run(*CORNERS, images=tmp_path / "fake.npz", reference=tmp_path / "real.npz").metrics
    seen, others = (Corners()(torch.from_numpy(array).permute(0, 3, 1, 2)) for array in (images, real))

    def frechet(one, two):
        (m, s), (n, t) = ((x.double().mean(0).numpy(), np.cov(x.double().numpy().T)) for x in (one, two))
        roots = np.sqrt(np.maximum(np.linalg.eigvals(s @ t).real, 0))
        return ((m - n) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * roots.sum()

    assert found["fid"] == pytest.approx(frechet(seen[0], others[0]), rel=1e-4)
    assert found["sfid"] == pytest.approx(frechet(seen[2], others[2]), rel=1e-4)
    x, y = seen[0].double().numpy(), others[0].double().numpy()

    def radii(points):
        return np.sort(np.linalg.norm(points[:, None] - points[None], axis=2), axis=1)[:, 3]

    between = np.linalg.norm(x[:, None] - y[None], axis=2)
    assert found["precision"] == pytest.approx((between <= radii(y)[None]).any(axis=1).mean())
    assert found["recall"] == pytest.approx((between <= radii(x)[:, None]).any(axis=0).mean())
    # one split is the definition; ten shuffled ones have about its mean
    p = torch.softmax(seen[1].double(), 1)
    whole = float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp())
    assert 1 < found["inception_score"] <= whole * 1.02

    def kernel(one, two):
        return (one @ two.T / x.shape[1] + 1) ** 3

    subset = found["kid_subset"]
    assert subset == 40
    a, c = kernel(x, x), kernel(x, y).mean()
    own = (a.sum() - np.trace(a)) / (subset * (subset - 1))
    b = kernel(y, y)
    theirs = (b.sum() - np.trace(b)) / (50 * 49)
    assert found["kid"] == pytest.approx(own + theirs - 2 * c, abs=4 * found["kid_std"])


def test_statistics_alone_allow_what_they_allow(run, tmp_path, capsys):
    arrays = archive_arrays()
    images = np.random.default_rng(0).integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    np.savez(tmp_path / "adm.npz", **arrays)
    words = (*CORNERS, "features.archive_statistics=true")
    found = run(*words, images=tmp_path / "x.npz", reference=tmp_path / "adm.npz")
    assert {*found.metrics} == {"fid", "sfid", "inception_score", "inception_score_std"}
    assert "Left out: no precision and recall without images, which the reference has not" in capsys.readouterr().out
    swapped = {key: value.astype(value.dtype.newbyteorder(">")) for key, value in arrays.items()}
    np.savez(tmp_path / "big.npz", **swapped)
    big = run(*words, images=tmp_path / "x.npz", reference=tmp_path / "big.npz")
    assert big.metrics == found.metrics
    with pytest.raises(UserError, match="no precision and recall without images, which the reference has not"):
        run(*words, "metrics=[prc]", images=tmp_path / "x.npz", reference=tmp_path / "adm.npz")
    with pytest.raises(UserError, match=r"images=.*adm.npz holds statistics alone: give images"):
        run(*words, images=tmp_path / "adm.npz", reference=tmp_path / "adm.npz")


PIXELS = np.random.default_rng(0).integers(256, size=(40, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("array", "tells"),
    [
        (PIXELS / 255, "float64"),
        ((PIXELS / 127.5 - 1).astype(">f4"), "from -1 to 1"),
        (PIXELS.astype(np.float32), "from 0 to 255"),
        (PIXELS.astype(">i8"), ">i8"),
        (PIXELS.transpose(0, 3, 1, 2), r"shape \(40, 3, 8, 8\)"),
        ((PIXELS / 255).transpose(0, 3, 1, 2), "from 0 to 1"),
        (np.concatenate([PIXELS, PIXELS[..., :1]], axis=3), r"shape \(40, 8, 8, 4\)"),
    ],
)
def test_images_of_another_type_come_with_the_line_that_converts_them(run, tmp_path, array, tells):
    np.savez(tmp_path / "x.npz", arr_0=array)
    with pytest.raises(UserError, match=rf"images=.*x.npz: arr_0 is .*{tells}") as caught:
        run(images=tmp_path / "x.npz")
    code = str(caught.value).split("np.savez('images.npz', ")[1].split(") and give")[0]
    converted = eval(code, {"x": array})
    assert converted.dtype == np.uint8
    assert np.array_equal(converted, PIXELS)


@pytest.mark.parametrize("array", [PIXELS[..., 0], PIXELS[..., :1]])
def test_grey_images_become_colours(run, tmp_path, array):
    np.savez(tmp_path / "x.npz", arr_0=array)
    with pytest.raises(UserError, match=r"with x = that array") as caught:
        run(images=tmp_path / "x.npz")
    code = str(caught.value).split("np.savez('images.npz', ")[1].split(") and give")[0]
    assert np.array_equal(eval(code, {"x": array}), np.repeat(PIXELS[..., :1], 3, axis=3))


def test_mistakes_are_told_before_a_network_of_features_is_had(run, tmp_path, digits, generated, monkeypatch):
    monkeypatch.setattr("dcdit.evaluation.scoring.build_features", lambda *ignored: pytest.fail("built"))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([None] * 3))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    wide = tmp_path / "wide"
    wide.mkdir()
    Image.new("RGB", (20, 10)).save(wide / "0.png")
    for words, places, message in (
        ((), {"images": "nowhere.npz"}, "images=nowhere.npz does not exist"),
        ((), {"reference": "nowhere.npz"}, "reference=nowhere.npz does not exist"),
        ((), {"images": tmp_path / "objects.npz"}, r"images=.*objects.npz holds neither images"),
        ((), {"reference": tmp_path / "large.npz"}, "has images of 16 x 16 pixels, those to compare have 8 x 8"),
        ((), {"images": wide}, "0.png has 20 x 10 pixels, which is no square: give image_size=10"),
        (("count=45",), {}, "count=45: images=.* has 44, give count=null for all"),
        (("expected={fud:3}",), {}, r"expected.fud: fud is no figure that is computed, did you mean fid\?"),
        (("expected={recall:3}", "metrics=[fid]"), {}, "expected.recall: recall is no figure that is computed"),
    ):
        with pytest.raises(UserError, match=message):
            run(*words, **places)
    monkeypatch.undo()
    Image.new("RGB", (9, 9)).save(folder / "1.png")
    with pytest.raises(UserError, match=r"1.png has 9 x 9 pixels, the first image 8 x 8: give image_size=8"):
        run("metrics=[is]", images=folder)
    with pytest.raises(UserError, match=r"images: 2 images are too few for precision and recall"):
        run("metrics=[prc]", "image_size=8", images=folder)


def test_a_published_chain_is_checked_by_its_figures(run, capsys, tmp_path):
    figures = run("metrics=[fid,prc]").metrics
    good = f"expected={{fid:{figures['fid'] * 1.005},precision:{figures['precision']}}}"
    run("metrics=[fid,prc]", good)
    shown = capsys.readouterr().out
    assert "0.50% apart" in shown
    with pytest.raises(UserError, match=r"not as expected \(more than 1% apart\): fid: .* expected 3.943"):
        run("metrics=[fid,prc]", "expected={fid:3.943}")


def test_what_is_known_of_the_sampling_must_be_of_these_images(run, generated, tmp_path, capsys):
    for name, change in (("other", {"content": "00000000"}), ("old", {"content": None}), ("odd", {"training": 3})):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(generated / "samples.npz", folder)
        record = {**json.loads((generated / "samples.json").read_text()), **change}
        (folder / "samples.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
        found = run("metrics=[kid]", images=folder / "samples.npz", out=name)
        assert found.sampled is None
    shown = " ".join(capsys.readouterr().out.split())
    for why in ("tells of other images", "does not say which images", "is no record of dcdit.generate (training=3"):
        assert why in shown


def test_the_command_its_default_folder_and_the_report(generated, digits, tmp_path, capsys):
    shutil.copytree(generated, tmp_path / "images")
    words = ("images=images/samples.npz", f"reference={digits}/val", "features=digits", f"cache={tmp_path}/cache")
    said = typed(capsys, tmp_path, "score", *words)
    assert said.status == 0, said.err
    (path,) = (tmp_path / "images" / "scores").glob("*.json")
    assert os.path.relpath(path, tmp_path) in said.out
    found = read_score(path)
    page = call(report, compose_config(f"runs=[{tmp_path}/images]", f"out={tmp_path}/report", name="report"))
    text = page.read_text()
    assert f"{found.metrics['fid']:.4g}" in text
    for word in ("Images that were scored", "ema weights of decay 0.98", "Not comparable with published figures"):
        assert word in text
    assert "Nothing was measured yet" not in text
    values = json.loads(path.read_text())
    for change in ({"score_schema": 99}, {"metrics": {}}, {"plan": None}):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match="score again, or remove it"):
            read_score(path)


@pytest.mark.slow
def test_two_processes_at_once(generated, digits, tmp_path, run):
    words = (f"images={generated}/samples.npz", f"reference={digits}/val", "features=digits", "chunk_size=6")
    end(ranks(2, tmp_path, "score", *words, f"cache={tmp_path}/shared", f"out={tmp_path}/two"))
    (path,) = (tmp_path / "two").glob("*.json")
    assert read_score(path).metrics == pytest.approx(run("chunk_size=6").metrics, rel=1e-5)
