"""FID during training."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.configs import PLAIN_DIT, TINY, call, compose_config, train
from support.processes import end, ranks
from support.runs import assert_same_end

from dcdit import evaluate
from dcdit.errors import UserError
from dcdit.network.routing import PredictabilityRouter
from dcdit.training.callbacks.fid import FID as FIDCallback

FID = (
    "callbacks=fid",
    "features@callbacks.fid.features=digits",
    "callbacks.fid.count=40",
    "callbacks.fid.batch_size=8",
    "callbacks.fid.drop_fractions=[0,0.5]",
    "callbacks.fid.sampler.steps=3",
    "callbacks.fid.sampler.clip=true",
    "callbacks.fid.max_time_fraction=1",
    "trainer.val_check_interval=4",
    "trainer.precision=32-true",
)


@pytest.fixture
def trained(tiny, tmp_path):
    """Train with the callback; the statistics of references are kept in one place."""
    return lambda name, *overrides: tiny(name, *FID, f"callbacks.fid.cache={tmp_path}/cache", *overrides)


def validations(run: Path) -> list[dict[str, float]]:
    with (run / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/diffusion_loss")]
    return [{key: float(value) for key, value in row.items() if value and key.startswith("val/")} for row in rows]


def evaluated(run: Path, tmp_path: Path, digits: Path, weights: str = "ema") -> dict[float, dict]:
    """What ``dcdit.evaluate`` says of the run's last checkpoint, by drop fraction."""
    places = (f"checkpoint={run}/checkpoints/last.ckpt", f"reference={digits}/val", f"cache={tmp_path}/cache")
    settings = ("features=digits", "count=40", "batch_size=8", "drop_fractions=[0,0.5]", "metrics=[fid]")
    sampler = ("sampler=ddim", "sampler.steps=3", "sampler.clip=true", "precision=fp32")
    config = compose_config(*places, *settings, *sampler, f"weights={weights}", name="evaluate")
    results = [json.loads(result.path.read_text()) for result in call(evaluate, config)]
    return {result["plan"]["guidance"]["drop_fraction"]: result for result in results}


def test_it_measures_the_ema_weights_as_the_evaluation_does(trained, tmp_path, digits):
    # last in the order of the callbacks or not: Lightning swaps the average in for its own hooks alone
    run = trained("run", "trainer.max_steps=8", "callbacks.checkpoint.every_n_steps=4")
    logged = validations(run)
    assert len(logged) == 2
    ema, raw = (evaluated(run, tmp_path, digits, weights) for weights in ("ema", "raw"))
    for drop in (0.0, 0.5):
        assert logged[-1][f"val/fid@{drop:g}"] == pytest.approx(ema[drop]["metrics"]["fid"], rel=1e-4)
        assert logged[-1][f"val/fid@{drop:g}"] != pytest.approx(raw[drop]["metrics"]["fid"], rel=1e-4)
        assert logged[-1][f"val/keep_ratio@{drop:g}"] == pytest.approx(ema[drop]["keep_ratio"]["mean"], rel=1e-5)
        assert logged[-1][f"val/tflops@{drop:g}"] == pytest.approx(ema[drop]["tflops_per_image"], rel=1e-5)
    for step in (4, 8):
        for picture in ("samples", "boundaries"):
            with Image.open(run / "validation" / f"step_{step:08d}_{picture}.png") as image:
                assert min(image.size) > 100


def test_the_order_of_callbacks_does_not_matter(trained, monkeypatch):
    first = validations(trained("first", "trainer.max_steps=4"))
    from dcdit.training import run as module

    build = module.build_trainer

    def reordered(*arguments):
        trainer = build(*arguments)
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, FIDCallback))
        assert isinstance(trainer.callbacks[0], FIDCallback)
        return trainer

    monkeypatch.setattr(module, "build_trainer", reordered)
    assert validations(trained("second", "trainer.max_steps=4")) == first


def test_training_is_the_same_with_and_without(trained, tiny):
    with_it = trained("with", "trainer.max_steps=8")
    without = tiny("without", "trainer.max_steps=8", "trainer.val_check_interval=4", "trainer.precision=32-true")
    assert_same_end(with_it, without)


def test_its_share_of_the_time_is_bounded(trained, capsys, caplog):
    run = trained("run", "trainer.max_steps=12", "callbacks.fid.max_time_fraction=0.0001")
    # the first, and the one at the last step
    assert ["val/fid@0" in row for row in validations(run)] == [True, False, True]
    assert "FID left out, it would take more than max_time_fraction=0.0001 of the time" in caplog.text
    run = trained("seldom", "trainer.max_steps=12", "callbacks.fid.every=2")
    assert ["val/fid@0" in row for row in validations(run)] == [True, False, True]


def test_pictures_reach_the_loggers(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained("run", "trainer.max_steps=4", "logger=tensorboard")
    events = EventAccumulator(str(run / "tensorboard" / "version_0"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"val/samples", "val/boundaries"}
    assert "val/fid@0.5" in events.Tags()["scalars"]


def test_mistakes_end_before_the_first_step(trained, tiny, tmp_path):
    for override, message in (
        ("callbacks.fid.count=20", "20 images are too few for FID"),
        ("callbacks.fid.reference=nowhere", "reference=nowhere does not exist"),
        ("callbacks.fid.every=0", r"callbacks.fid.every=0 is not a positive number"),
        ("callbacks.fid.max_time_fraction=2", r"callbacks.fid.max_time_fraction=2 is outside"),
        ("callbacks.fid.drop_fractions=[1.1]", r"callbacks.fid.drop_fractions=1.1 is outside"),
        ("callbacks.fid.drop_fractions=[1.0]", "for which this network was not trained"),
        ("callbacks.fid.sampler.steps=0", r"callbacks.fid.sampler.steps=0"),
        ("callbacks.fid.guidance.scale=-1", r"callbacks.fid.guidance.scale=-1 is"),
        ("callbacks.fid.autoencoder=/nowhere/vae", "cannot be loaded"),
        ("+callbacks.fid.cout=40", r"^callbacks.fid.cout=40: there is no such key, did you mean count\?$"),
        ("+callbacks.ema.dekay=0.9", r"^callbacks.ema.dekay=0.9: there is no such key, did you mean decay\?$"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            trained("wrong", "trainer.max_steps=2", override)
        assert isinstance(caught.value, UserError) or isinstance(caught.value.__cause__, UserError)
    with pytest.raises(UserError, match="DiT/2 drops no tokens"):
        trained("dit", "trainer.max_steps=2", *PLAIN_DIT)


def test_the_reference_is_found_before_the_feature_network_is_built(trained, monkeypatch):
    monkeypatch.setattr("dcdit.training.callbacks.fid.build_features", lambda *ignored: pytest.fail("built"))
    with pytest.raises(UserError, match=r"^callbacks\.fid\.reference=nowhere does not exist.* the split `val` beside"):
        trained("wrong", "trainer.max_steps=2", "callbacks.fid.reference=nowhere")


def test_it_needs_a_validation_split(tmp_path, digits):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train").symlink_to(digits / "train")
    config = compose_config(*TINY, *FID, f"data.directory={data}", "data.source=null", "trainer.max_steps=2")
    config.callbacks.fid.reference = str(data / "train")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="has no split `val`"):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_measure_what_evaluate_does(tmp_path, digits):
    places = (f"data.directory={digits}", f"run_dir={tmp_path}/two", f"callbacks.fid.cache={tmp_path}/cache")
    settings = (*TINY, *FID, "trainer.max_steps=4", "trainer.devices=2", "trainer.strategy=ddp")
    end(ranks(2, tmp_path, "train", *places, *settings))
    logged = validations(tmp_path / "two")[-1]
    for drop, expected in evaluated(tmp_path / "two", tmp_path, digits).items():
        # the halves of the images meet the classifier in other batches, which rounds its features otherwise
        assert logged[f"val/fid@{drop:g}"] == pytest.approx(expected["metrics"]["fid"], rel=1e-4)
        assert logged[f"val/keep_ratio@{drop:g}"] == pytest.approx(expected["keep_ratio"]["mean"], rel=1e-5)
        assert logged[f"val/tflops@{drop:g}"] == pytest.approx(expected["tflops_per_image"], rel=1e-5)


def test_the_sum_over_processes_is_the_whole(digits):
    """The reference counts once, however many processes bring their sums together."""
    from support.configs import digit_features

    from dcdit.evaluation.metrics import Statistics, frechet

    real, generated = digit_features()
    statistics = Statistics.of([real], len(real.features)).moments
    whole, parts = frechet(statistics), [frechet(statistics, real=rank == 0) for rank in range(3)]
    whole.update(generated.features, real=False)
    for part, features in zip(parts, generated.features.chunk(3), strict=True):
        part.update(features, real=False)
    for state in (f"{side}_features_{kind}" for side in ("real", "fake") for kind in ("sum", "cov_sum", "num_samples")):
        setattr(parts[0], state, torch.stack([getattr(part, state) for part in parts]).sum(0))
    assert float(parts[0].compute()) == pytest.approx(float(whole.compute()), rel=1e-6)


def test_a_capacity_bounds_what_is_measured_and_what_had_no_room_is_logged(trained, monkeypatch):
    monkeypatch.setattr(PredictabilityRouter, "BIAS", 1.0)  # a fresh router that keeps nearly all
    words = ("trainer.max_steps=4", "callbacks.ema.decay=0", "callbacks.fid.drop_fractions=[0]")
    (free,), (bounded,) = (
        validations(trained(str(key), *words, f"callbacks.fid.capacity={key}")) for key in ("null", 0.25)
    )
    assert "val/dropped_by_capacity@0" not in free
    assert 0 < bounded["val/dropped_by_capacity@0"] < 1
    assert bounded["val/keep_ratio@0"] <= 0.25 < free["val/keep_ratio@0"]
    with pytest.raises(UserError, match=r"callbacks\.fid\.capacity=0\.25: DiT.* drops no tokens"):
        trained("plain", *PLAIN_DIT, *words, "callbacks.fid.capacity=0.25")
