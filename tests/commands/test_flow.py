"""Flow matching from training to figures, beside DDPM."""

import json
import os

import pytest
import torch
from support.configs import PLAIN_DIT, call, compose_config, config_of

from dcdit import evaluate, export, generate, sample
from dcdit.checkpoints.load import load_model, read_trained
from dcdit.errors import UserError
from dcdit.training.build import check_network

SAMPLERS = ("euler", "heun", "sde")
FLOW = ("diffusion=flow", "optimizer.schedule=constant")


@pytest.fixture
def flow(tiny):
    return tiny("flow", *FLOW, "diffusion.time=logit_normal", "trainer.max_steps=4")


def test_a_published_experiment_by_flow_matching():
    check_network(config_of("experiment=b_n4", "diffusion=flow"))
    check_network(config_of("experiment=b_n4", "diffusion=flow", "model.variance=false"))
    with pytest.raises(UserError, match=r"model.variance=false: diffusion=ddpm trains a variance"):
        check_network(config_of("experiment=b_n4", "model.variance=false"))


def test_a_run_that_goes_on_ends_with_the_same_bits(tiny, flow):
    whole = tiny("whole", *FLOW, "diffusion.time=logit_normal", "trainer.max_steps=7")
    tiny("flow", *FLOW, "diffusion.time=logit_normal", "trainer.max_steps=7", "ckpt_path=last")
    one, other = (read_trained(run / "checkpoints" / "last.ckpt") for run in (whole, flow))
    assert one.process.spec == other.process.spec == {**one.process.spec, "name": "flow", "time": "logit_normal"}
    for kind in ("ema", "raw"):
        for name, tensor in one.of_kind(kind).items():
            assert torch.equal(tensor, other.of_kind(kind)[name])
    with pytest.raises(UserError, match=r"diffusion.time='uniform': the run was trained with 'logit_normal'"):
        tiny("flow", *FLOW, "trainer.max_steps=8", "ckpt_path=last")
    logged = (flow / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "train/mse" in logged
    assert "train/vlb" not in logged


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_with_guidance_budget_and_pictures(flow, tmp_path, digits, sampler):
    words = (f"checkpoint={flow}", f"sampler={sampler}", "sampler.steps=3", "sampler.clip=true", "guidance.scale=2")
    extra = ("guidance.uncond_drop_fraction=0.5", "guidance.interval=[100,900]", "guidance.drop_fraction=0.2")
    folder = call(sample, compose_config(*words, *extra, "per_class=1", f"out={tmp_path}/pictures", name="sample"))
    assert {"samples.png", "latents.npz", "boundaries.png"} <= {path.name for path in folder.iterdir()}
    points = ("features=digits", "count=40", f"reference={digits}/val", f"cache={tmp_path}/cache", "time_rounds=1")
    budgets = ("drop_fractions=[0,0.5]", f"out={tmp_path}/figures")
    for measured in call(evaluate, compose_config(*words, *points, *budgets, name="evaluate")):
        result = json.loads(measured.path.read_text())
        assert result["plan"]["sampler"]["name"] == sampler
        kept = result["keep_ratio"]
        assert len(kept["timesteps"]) == len(kept["main"]) == (5 if sampler == "heun" else 3)
        assert kept["timesteps"][0] == 1000
        assert result["tflops_per_image"] > 0


def test_samplers_of_the_other_process_are_refused_before_anything_is_sampled(flow, trained_run, tmp_path):
    for run, sampler, fitting in (
        (flow, "ddpm", "auto, euler, heun, sde"),
        (trained_run, "heun", "auto, ddpm, ddim, dpm"),
    ):
        config = compose_config(f"checkpoint={run}", f"sampler={sampler}", f"out={tmp_path}/x", name="generate")
        with pytest.raises(UserError, match=f"sampler={sampler} does not fit .* take sampler={fitting}"):
            call(generate, config)
    assert not (tmp_path / "x").exists()


def test_an_exported_network_says_what_it_was_trained_for(flow, tmp_path):
    folder = call(export, compose_config(f"checkpoint={flow}", f"out={tmp_path}/exported", name="export"))
    config = json.loads((folder / "config.json").read_text())
    assert config["diffusion"]["process"] == "flow"
    assert load_model(folder).process.spec == load_model(flow).process.spec
    words = ("sampler=ddim", f"out={tmp_path}/x")
    with pytest.raises(UserError, match="does not fit a network that was trained with diffusion=flow"):
        call(sample, compose_config(f"checkpoint={folder}", *words, name="sample"))


def test_without_variance_channels(tiny, tmp_path):
    for name, words in (("dcdit", ()), ("dit", PLAIN_DIT)):
        run = tiny(name, *FLOW, *words, "model.variance=false", "trainer.max_steps=2")
        network = load_model(run).network
        assert network(torch.zeros(1, 1, 8, 8), torch.tensor([500.0]), torch.tensor([1])).prediction.shape[1] == 1
        out = f"out={tmp_path}/{name}_images"
        words = (f"checkpoint={run}", "sampler=heun", "sampler.steps=2", "guidance.scale=2", "per_class=1", out)
        call(sample, compose_config(*words, name="sample"))


def test_fid_while_training(tiny, digits):
    words = ("callbacks=fid", "features@callbacks.fid.features=digits", "callbacks.fid.count=40")
    few = ("callbacks.fid.sampler.steps=2", "trainer.val_check_interval=2", "trainer.max_steps=2")
    run = tiny("fid", *FLOW, *words, *few)
    assert "val/fid@0" in (run / "logs" / "version_0" / "metrics.csv").read_text()
    with pytest.raises(UserError, match="sampler=ddim does not fit"):
        tiny("other", *FLOW, *words, *few, "sampler@callbacks.fid.sampler=ddim")


def test_what_is_said_at_the_end_can_be_typed(tiny, tmp_path, caplog):
    for process in ("flow", "ddpm"):
        caplog.clear()
        run = tiny(process, f"diffusion={process}", "trainer.max_steps=1")
        (word,) = caplog.text.split("python -m dcdit.sample ")[-1].split()
        assert word == f"checkpoint={os.path.relpath(run)}"
        call(sample, compose_config(word, "sampler.steps=2", f"out={tmp_path}/{process}_images", name="sample"))


def test_weights_and_teachers_of_the_other_process(tiny, trained_run, caplog):
    place = f"init.checkpoint={trained_run}/checkpoints/last.ckpt"
    tiny("tuned", *FLOW, "init=weights", place, "trainer.max_steps=1")
    assert "was trained with diffusion=ddpm; with diffusion=flow" in caplog.text
    teacher = tiny("teacher", *PLAIN_DIT, "trainer.max_steps=2")
    place = f"init.teacher={teacher}/checkpoints/last.ckpt"
    with pytest.raises(UserError, match="trained with diffusion=ddpm, whose hidden states are of other noise"):
        tiny("student", *FLOW, "init=upcycle", place, "init.distil_steps=2", "trainer.max_steps=2")
