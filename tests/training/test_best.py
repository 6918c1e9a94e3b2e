"""``callbacks.checkpoint.best``: one checkpoint stays, the one that the validations found best, whatever happens."""

import csv
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import compose_config
from support.runs import load

from dcdit.checkpoints.load import load_model
from dcdit.errors import UserError
from dcdit.runs.resume import checkpoint_name
from dcdit.training.callbacks import Checkpoint
from dcdit.training.callbacks.best import BEST, best_checkpoints, metric_to_watch
from dcdit.training.callbacks.fid import FID

BEST_LOSS = "callbacks.checkpoint.best=val/diffusion_loss"


def validations(run: Path) -> dict[int, float]:
    """The validation loss by step, of all log files; Lightning logs it at the step before the count."""
    losses = {}
    for file in sorted(run.glob("logs/version_*/metrics.csv")):
        with file.open() as stream:
            rows = [row for row in csv.DictReader(stream) if row.get("val/diffusion_loss")]
        losses |= {int(row["step"]): float(row["val/diffusion_loss"]) for row in rows}
    return losses


def test_the_checkpoint_of_the_least_loss_stays_over_a_resume(tiny):
    often = ("trainer.val_check_interval=1", "callbacks.ema.decay=0", "callbacks.checkpoint.keep=1")
    words = (*often, "optimizer.schedule=constant", BEST_LOSS)
    run = tiny("run", "trainer.max_steps=3", "optimizer.lr=0.001", *words)
    (first,) = best_checkpoints(run / "checkpoints").values()
    # One step of an enormous learning rate makes everything worse.
    run = tiny("run", "trainer.max_steps=4", "optimizer.lr=3", "ckpt_path=last", *words)
    ((path, best),) = best_checkpoints(run / "checkpoints").items()
    losses = validations(run)
    assert len(losses) == 4
    assert best == first
    assert best.value == pytest.approx(min(loss for loss in losses.values() if math.isfinite(loss)), rel=1e-6)
    stored = load(run, BEST)
    assert stored["global_step"] == best.step <= 3
    assert load(run)["global_step"] == 4
    assert path.stat().st_ino == (run / "checkpoints" / BEST).stat().st_ino
    # It is a checkpoint like any other: sampled by its name.
    assert load_model(str(run / "checkpoints" / BEST)).step == best.step
    assert load_model(str(run)).step == 4


def test_a_metric_that_is_not_measured_is_refused_before_the_first_step(tiny, digits, tmp_path):
    with pytest.raises(UserError, match=r"best='val/fid'.*They log val/diffusion_loss; callbacks=fid measures FID"):
        tiny("run", "callbacks.checkpoint.best=val/fid")
    (tmp_path / "alone").mkdir()
    shutil.copytree(digits / "train", tmp_path / "alone" / "train")
    with pytest.raises(UserError, match="without a split `val`"):
        tiny("run", BEST_LOSS, f"data.directory={tmp_path}/alone", "data.source=null")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_names_of_metrics():
    names = FID.validation_metrics.fget(SimpleNamespace(drop_fractions=[0.0, 0.3]))
    callbacks = [SimpleNamespace(validation_metrics=names), SimpleNamespace()]
    assert metric_to_watch("val/fid", callbacks, True) == "val/fid@0"
    assert metric_to_watch("val/fid@0.3", callbacks, True) == "val/fid@0.3"
    with pytest.raises(UserError, match=r"They log val/diffusion_loss, val/fid@0, val/fid@0\.3$"):
        metric_to_watch("val/tflops", callbacks, True)  # nobody knows whether more is better


def followed(folder: Path, values: list[float], metric: str = "val/fid@0", first: int = 1) -> Checkpoint:
    """A callback that has seen validations with these values, at steps 1, 2, ... or from ``first`` on."""
    callback = Checkpoint(str(folder), 1, 1, None, metric)
    trainer = SimpleNamespace(global_step=first - 1, is_global_zero=True, sanity_checking=False, ckpt_path=None)
    callback.on_train_start(trainer, None)
    for step, value in enumerate(values, first):
        (folder / checkpoint_name(step)).write_text(str(step))
        trainer.global_step, trainer.callback_metrics = step, {metric: torch.tensor(value)}
        callback.on_validation_end(trainer, None)
        callback._prune()
    return callback


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True) | st.just(2.5), min_size=1, max_size=6),
    st.integers(0, 6),
    st.sampled_from(["val/fid@0", "val/inception_score@0.3"]),
)
def test_the_first_of_the_best_stays_wherever_the_run_was_cut(tmp_path_factory, values, cut, metric):
    folder = tmp_path_factory.mktemp("checkpoints")
    followed(folder, values[:cut], metric)
    followed(folder, values[cut:], metric, first=cut + 1) if values[cut:] else None
    finite = [value for value in values if math.isfinite(value)]
    found = list(best_checkpoints(folder).values())
    if not finite:
        assert (found, (folder / BEST).exists()) == ([], False)
        return
    best = (max if "score" in metric else min)(finite)
    (found,) = found
    assert found.step == values.index(best) + 1
    assert (folder / BEST).read_text() == str(found.step)
    files = {path.name for path in folder.iterdir()}
    assert files == {BEST, found.name, checkpoint_name(len(values))}


def test_a_kill_between_two_links_and_going_back(tmp_path):
    followed(tmp_path, [3.0, 2.0])
    (tmp_path / "best_fid@0_4_step_00000001.ckpt").write_text("1")  # not yet deleted
    (tmp_path / BEST).unlink()
    (tmp_path / BEST).write_text("1")  # not yet replaced
    followed(tmp_path, [5.0], first=3)
    assert [best.step for best in best_checkpoints(tmp_path).values()] == [2]
    assert (tmp_path / BEST).read_text() == "2"
    (tmp_path / "best_x_y_step_00000001.ckpt").write_text("of somebody else")
    for path in tmp_path.glob("step_*"):
        path.unlink()
    followed(tmp_path, [9.0], first=2)  # back to step 1: the best of step 2 is of steps that are done again
    assert [(best.step, best.value) for best in best_checkpoints(tmp_path).values()] == [(2, 9.0)]
    assert (tmp_path / "abandoned_best_fid@0_2_step_00000002.ckpt").read_text() == "2"
    followed(tmp_path, [8.0], "val/inception_score@0", first=3)  # another metric: a new beginning
    assert [best.metric for best in best_checkpoints(tmp_path).values()] == ["inception_score@0"]


def test_the_option_is_off_unless_it_is_asked_for():
    assert compose_config("experiment=b_n4").callbacks.checkpoint.best is None
