"""Runs as a user types them: training, resuming, stopping, sampling."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from support.configs import PLAIN_DIT, TINY, call, compose_config, train
from support.runs import STATE, assert_same_end, differences, load, logged, start, wait_for

from dcdit.errors import UserError
from dcdit.runs.resume import checkpoints_in
from dcdit.sample import sample as sample_command


@pytest.fixture(scope="module", params=["32-true", "bf16-mixed"])
def uninterrupted(request, digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted")
    overrides = [
        *TINY,
        f"data.directory={digits}",
        f"trainer.precision={request.param}",
        "data.batch_size=16",
        "trainer.max_steps=120",  # the training split has 101 batches: over the border of an epoch
        "callbacks.checkpoint.every_n_steps=15",
        "callbacks.checkpoint.keep=null",
        "trainer.val_check_interval=50",
        "optimizer.lr_warmup_steps=3",
    ]
    train(compose_config(*overrides), run)
    return run, overrides


@pytest.mark.parametrize("step", [15, 90])
def test_a_resumed_run_equals_the_uninterrupted_one(uninterrupted, tmp_path, step):
    run, overrides = uninterrupted
    (tmp_path / "logs").mkdir()
    train(compose_config(*overrides, f"ckpt_path={run}/checkpoints/step_{step:08d}.ckpt"), tmp_path)
    a, b = load(run), load(tmp_path)
    assert [d for key in STATE for d in differences(a[key], b[key], key)] == []
    before, after = logged(run), logged(tmp_path)
    assert {key for key in before if key[0] >= step} == set(after)
    assert all(before[key] == value for key, value in after.items())


def test_a_checkpoint_holds_raw_weights_average_and_plain_values(uninterrupted):
    run, _ = uninterrupted
    checkpoint = load(run)
    assert checkpoint["global_step"] == 120
    assert checkpoint["hyper_parameters"]["latents"]["autoencoder"] == "identity"
    raw, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert raw.keys() == average.keys()
    assert not torch.equal(raw["network.embed.weight"], average["network.embed.weight"])
    files = {path.name for path in (run / "checkpoints").iterdir()}
    assert files >= {"last.ckpt", "step_00000015.ckpt", "step_00000120.ckpt"}
    assert "max_steps: 120" in (run / "config.yaml").read_text()


def test_the_average_follows_the_weights(tiny):
    class Record(Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights.append(pl_module.network.embed.weight.detach().clone())

    from dcdit.training import run as module

    record, build = Record(), module.build_trainer

    def with_record(*arguments):
        trainer = build(*arguments)
        trainer.callbacks.insert(0, record)
        return trainer

    module.build_trainer = with_record
    try:
        run = tiny("average", "trainer.max_steps=6", "callbacks.ema.decay=0.9")
    finally:
        module.build_trainer = build
    average = record.weights[0]
    for weight in record.weights[1:]:
        average = 0.9 * average + 0.1 * weight
    torch.testing.assert_close(load(run)["state_dict"]["network.embed.weight"], average)
    assert torch.equal(load(run)["current_model_state"]["network.embed.weight"], record.weights[-1])


def test_gradient_accumulation_splits_the_stated_batch(tiny):
    run = tiny("accumulate", "trainer.max_steps=3", "trainer.accumulate_grad_batches=4")
    assert load(run)["LatentDataModule"]["place"]["done"] == (({"world_size": 1, "batch_size": 8, "window": 2000}, 3),)
    with pytest.raises(UserError, match=r"data.batch_size=8 cannot be split"):
        tiny("odd", "trainer.max_steps=3", "trainer.accumulate_grad_batches=3")


def test_a_dit_trains_on_the_same_path(tiny):
    run = tiny("dit", "trainer.max_steps=3", *PLAIN_DIT)
    assert "train/keep_ratio" not in {name for _, name in logged(run)}


def test_what_would_go_wrong_is_said_before_training(tiny, digits, tmp_path):
    for overrides, message in (
        (["model.grid=12"], r"model.grid=12 does not fit the shards, which have 8"),
        (["model.num_classes=9"], r"model.num_classes=9 does not fit the shards, which have 10"),
        (["model.channels=4"], r"model.channels=4 does not fit"),
        ([f"data.directory={tmp_path}/none", "data.source=null"], r"manifest.json does not exist"),
        (["data.batch_size=0"], r"data.batch_size=0 is not a positive number"),
        (["data.batch_size=4096"], r"data.batch_size=4096 exceeds the 1617 samples .*lower data.batch_size"),
        (["data.autoencoder=vae"], r"data.autoencoder=vae, but the shards .* were made with identity"),
        (["data.scale=0.18215"], r"data.scale=0.18215, but the shards .* were made with 1:"),
        (["data.corrupt_limit=-1"], r"data.corrupt_limit=-1 is negative"),
        (["data.directory=pipe:cat"], r"data.directory='pipe:cat' runs a shell command"),
        (["ckpt_path=last"], r"there is no checkpoint .*last.ckpt"),
        (["trainer.accelerator=gpu"], r"no usable CUDA device.*trainer=cpu"),
        ((*PLAIN_DIT, "multi_budget=wide"), r"multi_budget.fractions=.*multi_budget=none"),
    ):
        if "gpu" in str(overrides) and torch.cuda.is_available():
            continue
        with pytest.raises(UserError, match=message):
            tiny("wrong", *overrides)
    assert not (tmp_path / "wrong" / "checkpoints").exists()


def test_an_earlier_run_is_not_overwritten(tiny):
    run = tiny("once", "trainer.max_steps=2")
    with pytest.raises(UserError, match=r"already holds a run: go on with it by resume=.*once"):
        tiny("once", "trainer.max_steps=2")
    tiny("once", "trainer.max_steps=4", "ckpt_path=auto")
    assert load(run)["global_step"] == 4


def newest(run) -> int:
    """The step of the newest checkpoint."""
    return next(iter(checkpoints_in(run / "checkpoints")), 0)


def test_killed_and_interrupted_runs_lose_nothing(tiny, digits, tmp_path):
    """SIGKILL at random moments, then Ctrl-C, then to the end: as if nothing had happened."""
    overrides = ["trainer.max_steps=200", "optimizer.schedule=constant"]
    whole = tiny("whole", *overrides)
    overrides.append("callbacks.checkpoint.every_n_steps=1")
    run, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"

    killed_at, chance = 0, random.Random(0)
    for _ in range(4):
        process = start(run, digits, *overrides)
        wait_for(lambda: newest(run) > killed_at or process.poll() is not None)  # noqa: B023 - called in the loop
        time.sleep(chance.uniform(0, 0.5))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed_at = newest(run)
    assert 0 < killed_at < 200

    process = start(run, digits, *overrides)
    before = os.stat(last).st_mtime_ns
    wait_for(lambda: os.stat(last).st_mtime_ns != before or process.poll() is not None)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    assert "Stopped and saved at step" in process.err
    assert f"python -m dcdit.train resume={run.name}" in process.err
    stopped_at = load(run)["global_step"]
    assert killed_at < stopped_at < 200

    assert start(run, digits, *overrides).wait() == 0
    assert_same_end(whole, run)


def test_sampling_from_a_run(trained_run, tmp_path):
    run = trained_run

    def sample(out: str, *overrides: str):
        places = [f"checkpoint={run}/checkpoints/last.ckpt", f"out={tmp_path / out}"]
        arguments = [*places, "sampler.steps=4", "per_class=2"]
        from dcdit import sample

        return call(sample, compose_config(*arguments, "precision=fp32", *overrides, name="sample"))

    folder = sample("one", "guidance.scale=2", "guidance.uncond_drop_fraction=0.5")
    assert {p.name for p in folder.iterdir()} == {"samples.png", "boundaries.png", "latents.npz"}
    with np.load(folder / "latents.npz") as stored:
        latents, labels = stored["latents"], stored["labels"]
    assert latents.shape == (20, 1, 8, 8)
    assert labels.tolist() == sorted(list(range(10)) * 2)

    other = sample("two", "guidance.scale=2", "guidance.uncond_drop_fraction=0.5", "batch_size=3")
    with np.load(other / "latents.npz") as stored:
        np.testing.assert_allclose(stored["latents"], latents, rtol=0, atol=1e-4)

    assert "boundaries.png" not in {path.name for path in sample("three", "frames=0").iterdir()}
    for overrides, message in (
        (["classes=[11]"], "classes: 11 is neither"),
        (["guidance.drop_fraction=1.0"], "guidance.drop_fraction=1: the backbone is left out, for which"),
        (["guidance.drop_fraction=half"], r"guidance.drop_fraction='half'"),
        (["sampler.name=eule"], r"sampler\.name='eule'"),
        (["guidance.scale=-1"], r"guidance\.scale=-1"),
        (["+guidance.scal=2"], r"guidance\.scal=2: there is no such key, did you mean scale"),
        (["checkpoint=???"], r"checkpoint is not set: give checkpoint="),
        (["weights=mean"], "weights='mean'"),
        (["checkpoint=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["device=cuda:99"], "device='cuda:99'"),
        (["+per_clas=2"], "did you mean per_class"),
    ):
        with pytest.raises(UserError, match=message):
            sample("wrong", *overrides)
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(UserError, match=r"execution\.capacity=0\.4: there is no such key, did you mean capacity\?"):
        sample_command.compose("execution.capacity=0.4")


def test_a_full_disk_leaves_the_last_checkpoint_whole(tiny, monkeypatch):
    run = tiny("full", "trainer.max_steps=2")
    original = torch.save

    def full(checkpoint, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"the disk is full.*ckpt_path=last"):
        tiny("full", "trainer.max_steps=4", "ckpt_path=last")
    monkeypatch.setattr(torch, "save", original)
    assert load(run)["global_step"] == 2
    assert not list((run / "checkpoints").glob(".*"))


def test_raw_and_ema_weights(trained_run):
    from dcdit.checkpoints.load import load_model

    run = trained_run
    path = str(run / "checkpoints" / "last.ckpt")
    stored = load(run)
    raw, average = load_model(path, "raw").network, load_model(path, "ema").network
    assert torch.equal(raw.embed.weight, stored["current_model_state"]["network.embed.weight"])
    assert torch.equal(average.embed.weight, stored["state_dict"]["network.embed.weight"])


def test_a_strange_checkpoint_builds_nothing_off_the_list(tmp_path):
    from dcdit.checkpoints.load import load_model

    path = tmp_path / "strange.ckpt"
    settings = {"model": {"name": "os.system", "command": "true"}, "latents": {}}
    torch.save({"hyper_parameters": settings, "state_dict": {}, "global_step": 0}, path)
    with pytest.raises(UserError, match=r"model.name='os.system' is not one of dcdit, dit"):
        load_model(str(path))
    torch.save({"weights": {}}, path)
    with pytest.raises(UserError, match=r"was not written by dcdit.train"):
        load_model(str(path))
