import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from support.configs import TINY, config_of, module_of, perturb

from dcdit.data.stream import Batch
from dcdit.errors import UserError


class Trainer:
    """What the module asks of its trainer."""

    global_step = 0
    world_size = 1
    accumulate_grad_batches = 1
    log_every_n_steps = 1
    precision_plugin = Precision()


@pytest.fixture
def module(monkeypatch, request):
    words = getattr(request, "param", ())
    module = module_of(config_of(*TINY, "optimizer.lr_warmup_steps=0", *words))
    monkeypatch.setattr(type(module), "trainer", Trainer())
    monkeypatch.setattr(type(module), "global_rank", 0, raising=False)
    module.logged = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: module.logged.update(values))
    monkeypatch.setattr(module, "log", lambda name, value, **_: module.logged.update({name: value}))
    perturb(module.network)
    return module


def batch():
    return Batch(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 10)


def step(module, optimizer, data):
    optimizer.zero_grad()
    module.training_step(data, 0).backward()
    module.configure_gradient_clipping(optimizer, 1.0)
    optimizer.step()


def test_a_step_is_a_function_of_seed_and_step(module):
    first = module.training_step(batch(), 0)
    torch.rand(7)  # the global random state does not matter
    assert torch.equal(module.training_step(batch(), 0), first)
    module.trainer.global_step = 1
    try:
        assert not torch.equal(module.training_step(batch(), 0), first)
    finally:
        Trainer.global_step = module.trainer.global_step = 0


def test_what_is_logged(module):
    step(module, module.configure_optimizers()["optimizer"], batch())
    names = "diffusion_loss mse vlb ratio_loss gradient_norm skipped_steps"
    names += " keep_ratio keep_ratio_min keep_ratio_max keep_ratio_after_drop"
    assert {f"train/{name}" for name in names.split()} <= set(module.logged)
    logged = {name: float(value) for name, value in module.logged.items()}
    assert logged["train/keep_ratio_min"] <= logged["train/keep_ratio"] <= logged["train/keep_ratio_max"]
    total = logged["train/diffusion_loss"] + 0.03 * logged["train/ratio_loss"]
    assert logged["train/loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("module", [(), ("optimizer=muon",)], ids=["adamw", "muon"], indirect=True)
def test_a_non_finite_step_changes_nothing_and_is_counted(module):
    optimizer = module.configure_optimizers()["optimizer"]
    step(module, optimizer, batch())
    before = copy.deepcopy((module.network.state_dict(), optimizer.state_dict()["state"]))
    latents, labels, _ = batch()
    latents[0, 0, 0, 0] = float("inf")
    step(module, optimizer, Batch(latents, labels))
    after = (module.network.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert module.skipped.tolist() == [1, 1]
    step(module, optimizer, batch())
    assert module.skipped.tolist() == [1, 0]
    assert not torch.equal(module.network.embed.weight, before[0]["embed.weight"])


def test_a_gradient_scaler_changes_neither_clipping_nor_the_step(module, monkeypatch):
    optimizer = module.configure_optimizers()["optimizer"]
    step(module, optimizer, batch())
    start = copy.deepcopy((module.network.state_dict(), optimizer.state_dict()))
    step(module, optimizer, batch())
    weights, norm = copy.deepcopy(module.network.state_dict()), float(module.logged["train/gradient_norm"])
    assert norm > 1  # so that clipping to 1 matters

    module.network.load_state_dict(start[0])
    optimizer.load_state_dict(start[1])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(module.trainer, "precision_plugin", SimpleNamespace(scaler=scaler))
    optimizer.zero_grad()
    scaler.scale(module.training_step(batch(), 0)).backward()
    module.configure_gradient_clipping(optimizer, 1.0)
    scaler.step(optimizer)
    assert float(module.logged["train/gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(module.network.state_dict(), weights, rtol=1e-5, atol=1e-6)


def test_too_many_in_a_row_stop_training(tiny, monkeypatch):
    from dcdit.data.datamodule import LatentDataModule
    from dcdit.errors import TrainingError

    original = LatentDataModule.on_after_batch_transfer

    def broken(self, *args):
        batch = original(self, *args)
        return batch._replace(latents=batch.latents * float("nan"))

    monkeypatch.setattr(LatentDataModule, "on_after_batch_transfer", broken)
    with pytest.raises(TrainingError, match=r"last 4 steps .*nonfinite_limit=4.*ckpt_path=last"):
        tiny("nan", "nonfinite_limit=4", "trainer.max_steps=50")


def test_validation_leaves_the_random_state_alone(module):
    module.validation_step(batch(), 0)
    first = module.logged["val/diffusion_loss"]
    state = torch.get_rng_state()
    module.validation_step(batch(), 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.logged["val/diffusion_loss"], first)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compression=1", r"compression=1 must be greater than 1"),
        ("multi_budget.fractions=[0,1.0]", r"budget\.fractions=1 is outside \[0, 1\)"),
        ("model.heads=7", r"model\.heads=7 does not divide width=32"),
        ("model.width=wide", r"model.width='wide' is not a whole number"),
        ("+model.widht=3", r"model.widht=3: there is no such key, did you mean width\?"),
        ("model.name=dcdti", "model.name='dcdti' is not one of dcdit, dit"),
        ("optimizer.lr=-1", r"optimizer\.lr=-1 is not positive"),
        ("trainer.max_steps=many", r"trainer\.max_steps='many' is not a whole number"),
        ("trainer.max_steps=1.5", r"trainer\.max_steps=1\.5 is not a whole number"),
        ("ratio.group=0", r"ratio\.group=0"),
    ],
)
def test_wrong_values(override, message):
    with pytest.raises(UserError, match=message):
        module_of(config_of(*TINY, override))


def test_an_unknown_schedule_is_named():
    with pytest.raises(UserError, match=r"optimizer.schedule='cosien'"):
        config_of(*TINY, "optimizer.schedule=cosien")
