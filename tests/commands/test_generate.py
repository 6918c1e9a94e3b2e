"""Many images in one file, as users make them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.configs import call, compose_config
from support.damage import damaged

from dcdit import generate, sample
from dcdit.errors import UserError
from dcdit.sampling import archive
from dcdit.sampling.generate import labels_of


@pytest.fixture
def run(trained_run, tmp_path):
    """Generate from a network of three steps; returns the folder."""
    checkpoint = trained_run / "checkpoints" / "last.ckpt"

    def to(out: str, *overrides: str) -> Path:
        places = (f"checkpoint={checkpoint}", f"out={tmp_path / out}")
        settings = ("count=22", "chunk_size=8", "sampler.steps=3", "batch_size=4", "sampler.clip=true")
        return call(generate, compose_config(*places, *settings, *overrides, name="generate"))

    to.checkpoint = checkpoint
    return to


def test_what_the_file_holds(run, tmp_path):
    folder = run("out", "png=true", "labels=balanced")
    with np.load(folder / "samples.npz", allow_pickle=False) as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    assert (images.shape, images.dtype) == ((22, 8, 8, 3), np.uint8)
    assert labels.tolist() == [number % 10 for number in range(22)]
    assert len(np.unique(images.reshape(22, -1), axis=0)) == 22
    with Image.open(folder / "png" / "000021.png") as picture:
        assert np.array_equal(np.asarray(picture), images[21])
    figures = json.loads((folder / "samples.json").read_text())
    assert figures["plan"]["sampler"]["steps"] == 3
    assert (figures["plan"]["weights"], figures["plan"]["step"]) == ("ema", 3)
    assert 0 < figures["keep_ratio"] <= 1
    assert figures["tflops_per_image"] > 0
    assert {path.name for path in folder.glob("[!.]*")} == {"samples.npz", "samples.json", "png"}

    # the same images as `dcdit.sample` draws: sample i of (seed, i)
    arguments = (f"checkpoint={run.checkpoint}", f"out={tmp_path}/sampled", "sampler.steps=3", "sampler.clip=true")
    sampled = call(sample, compose_config(*arguments, "per_class=1", "batch_size=4", name="sample"))
    with np.load(sampled / "latents.npz") as stored:
        expected = ((stored["latents"] + 1) * 127.5 + 0.5).clip(0, 255).astype(np.uint8)
    assert np.array_equal(images[:10, :, :, 0], expected[:, 0])


def test_random_labels_depend_on_the_seed_and_the_number_alone():
    some, more, others = (labels_of("random", count, 10, seed) for count, seed in ((50, 0), (40_000, 0), (50, 1)))
    assert torch.equal(some, more[:50])
    assert not torch.equal(some, others)
    counts = torch.bincount(more, minlength=10).double()
    assert len(counts) == 10
    assert ((counts - 4000) ** 2 / 4000).sum() < 30  # chi squared of 9 degrees of freedom: 4e-4 above
    assert torch.bincount(labels_of("balanced", 22, 10, 0)).tolist() == [3, 3, *[2] * 8]


def test_any_number_of_processes_and_any_break_make_the_same_bytes(run, monkeypatch, capsys):
    whole = (run("whole") / "samples.npz").read_bytes()
    for rank in (1, 0):
        monkeypatch.setattr(generate, "processes", lambda rank=rank: (rank, 2))
        folder = run("two")
        assert (folder / "samples.npz").exists() == (rank == 0)
    monkeypatch.undo()
    assert (folder / "samples.npz").read_bytes() == whole

    decode, calls = archive.pixels, []

    def full(images):
        calls.append(1)
        if len(calls) > 4:  # in the third part
            raise OSError(28, "No space left on device")
        return decode(images)

    monkeypatch.setattr(archive, "pixels", full)
    with pytest.raises(UserError, match=r"No space left on device. Finished chunks are kept"):
        run("broken")
    monkeypatch.undo()
    capsys.readouterr()
    folder = run("broken")
    assert "Continuing: 2 of 3 chunks" in capsys.readouterr().err
    assert (folder / "samples.npz").read_bytes() == whole
    run("broken")  # complete: nothing to do
    assert (folder / "samples.npz").read_bytes() == whole


def test_a_finished_file_that_was_damaged_is_noticed(run):
    folder = run("out")
    whole = (folder / "samples.npz").read_bytes()
    for place, share in (("flip", 0.3), ("cut", 0.9)):
        (folder / "samples.npz").write_bytes(damaged(whole, (place, share, 2)))
        with pytest.raises(UserError, match=r"samples\.npz is damaged .*delete it"):
            run("out")
    (folder / "samples.npz").unlink()
    run("out")
    assert (folder / "samples.npz").read_bytes() == whole


@pytest.mark.parametrize("damage", [("cut", 0.0, 0), ("cut", 0.7, 0), ("flip", 0.6, 1)])
@pytest.mark.parametrize("which", ["chunk-000000.npy", "task-000000.json"])
def test_parts_that_a_power_loss_has_damaged_are_made_again(run, monkeypatch, damage, which):
    whole = (run("whole") / "samples.npz").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(generate, "processes", lambda: (0, 2))  # one of two: nothing is joined yet
        folder = run("broken")
    path = folder / ".generation" / which
    path.write_bytes(damaged(path.read_bytes(), damage))
    run("broken")
    assert (folder / "samples.npz").read_bytes() == whole


def test_other_images_are_not_mixed_in(run, tmp_path):
    run("out")
    for override, message in (
        ("seed=1", r"seed=1, but the generation there was begun with 0"),
        ("guidance.scale=2", r"guidance=.*but the generation there was begun with"),
        ("count=23", r"count=23, but the generation there was begun with 22"),
        ("weights=raw", r"weights=raw, but"),
    ):
        with pytest.raises(UserError, match=message):
            run("out", override)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "samples.npz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"samples.npz is there, but samples.json does not say what it holds"):
        run("foreign")


def test_mistakes(run):
    for override, message in (
        ("count=0", "count=0 is not a positive number"),
        ("guidance.drop_fraction=1.1", r"guidance.drop_fraction=1.1 is outside"),
        ("budget.fraction=2", r"budget.fraction=2 is outside"),
        ("budget.fraction=0.01", r"budget.fraction=0.01 cannot be met"),
        ("budget.by=cache", r"budget.by=cache meets no budget: give budget.fraction or budget.tflops"),
        ("checkpoint=nowhere", "nowhere does not exist"),
        ("out=???", "out is not set"),
        ("sampler.steps=0", "sampler.steps=0"),
        ("+cout=3", "cout=3: there is no such key, did you mean count"),
    ):
        with pytest.raises(UserError, match=message):
            run("wrong", override)


def test_a_budget_is_calibrated_once(tiny, tmp_path, capsys):
    checkpoint = tiny("deep", "trainer.max_steps=2", "model.depth=6") / "checkpoints" / "last.ckpt"
    stored = torch.load(checkpoint, weights_only=True)
    stored["state_dict"]["network.router.scorer.3.bias"].zero_()  # a fresh router keeps next to nothing
    torch.save(stored, checkpoint)
    settings = ("count=20", "chunk_size=20", "sampler.steps=5", "budget.fraction=0.8", "budget.by=drop")
    arguments = (f"checkpoint={checkpoint}", f"out={tmp_path}/some", *settings)
    folder = call(generate, compose_config(*arguments, name="generate"))
    assert "Budget: drop fraction 0." in capsys.readouterr().out
    figures = json.loads((folder / "samples.json").read_text())
    found = figures["calibration"]
    assert found["drop_fraction"] == figures["plan"]["guidance"]["drop_fraction"] > 0
    assert figures["tflops_per_image"] == pytest.approx(0.8 * found["full_tflops"], rel=0.03)
    store = checkpoint.parents[1] / "budgets.json"
    before = store.read_bytes()
    call(generate, compose_config(*arguments[:1], f"out={tmp_path}/again", *settings, name="generate"))
    assert store.read_bytes() == before
    with pytest.raises(UserError, match=r"budget.fraction=0.01 cannot be met by drops alone: from .* of the full cost"):
        call(generate, compose_config(*arguments, "budget.fraction=0.01", name="generate"))


@pytest.fixture
def keeps_half(run):
    """The network of three steps with a router that keeps about half; a fresh one keeps next to nothing."""
    stored = torch.load(run.checkpoint, weights_only=True)
    stored["state_dict"]["network.router.scorer.3.bias"].zero_()
    torch.save(stored, run.checkpoint)
    return run


def test_images_of_a_capacity_have_an_identity_of_their_own_and_what_had_no_room_is_told(keeps_half, tmp_path, capsys):
    exact = keeps_half("exact")
    plan = json.loads((exact / "samples.json").read_text())["plan"]
    assert not {"capacity", "dropped_by_capacity"} & {*plan, *json.loads((exact / "samples.json").read_text())}
    assert "no room" not in capsys.readouterr().out
    roomy = keeps_half("roomy", "capacity=1")
    images = [np.load(folder / "samples.npz")["arr_0"].astype(int) for folder in (exact, roomy)]
    assert np.abs(images[0] - images[1]).max() <= 1
    figures = json.loads((roomy / "samples.json").read_text())
    assert figures["plan"] == {**plan, "capacity": 1.0}
    assert "dropped_by_capacity" not in figures
    assert "no room" not in capsys.readouterr().out
    narrow = keeps_half("narrow", "capacity=0.2", "guidance.scale=2")
    told = capsys.readouterr().out
    figures = json.loads((narrow / "samples.json").read_text())
    dropped = figures["dropped_by_capacity"]
    assert 0 < dropped["share"] <= dropped["most"] < 1
    assert told.count("no room") == 1
    assert f"capacity=0.2: {dropped['share']:.2%} of the kept tokens had no room" in told
    for folder, words, message in (
        ("narrow", ("guidance.scale=2",), r"capacity=None, but the generation there was begun with 0\.2"),
        ("narrow", ("guidance.scale=2", "capacity=0.3"), r"capacity=0\.3, but .* begun with 0\.2"),
        ("exact", ("capacity=0.3",), r"capacity=0\.3, but .* begun with None"),
    ):
        with pytest.raises(UserError, match=message):
            keeps_half(folder, *words)
    suggested = told.partition("such as ")[2].partition(",")[0]
    keeps_half("enough", suggested, "guidance.scale=2")
    assert "no room" not in capsys.readouterr().out


def test_auto_is_measured_once_at_the_budget_that_was_met(keeps_half, tmp_path, capsys):
    words = ("capacity=auto", "guidance.scale=2", "budget.fraction=0.95", "budget.by=drop")
    folder = keeps_half("auto", *words)
    assert "no room" not in capsys.readouterr().out
    store = keeps_half.checkpoint.parents[1] / "capacities.json"
    before = store.read_bytes()
    (entry,) = json.loads(before)
    plan = json.loads((folder / "samples.json").read_text())["plan"]
    assert entry["settings"]["guidance"]["drop_fraction"] == plan["guidance"]["drop_fraction"] > 0
    assert plan["capacity"].startswith("auto ")
    assert len(entry["found"]["steps"]) == 3
    again = keeps_half("again", *words)
    assert json.loads((again / "samples.json").read_text())["plan"] == plan
    assert store.read_bytes() == before
    assert (again / "samples.npz").read_bytes() == (folder / "samples.npz").read_bytes()
    for steps, message in (([[0.5, 0.5]], "another number of steps: delete it"), ([[2, 0.5]] * 3, "delete it")):
        store.write_text(json.dumps([{**entry, "found": {"steps": steps}}]))
        with pytest.raises(UserError, match=rf"capacities\.json: .*{message}"):
            keeps_half("damaged", *words)


def test_a_picture_tells_what_had_no_room(keeps_half, tmp_path, capsys):
    places = (f"checkpoint={keeps_half.checkpoint}", f"out={tmp_path}/pictures", "sampler.steps=3", "per_class=3")
    call(sample, compose_config(*places, "capacity=0.1", name="sample"))
    assert capsys.readouterr().out.count("capacity=0.1: ") == 1
    call(sample, compose_config(*places, name="sample"))
    assert "no room" not in capsys.readouterr().out
