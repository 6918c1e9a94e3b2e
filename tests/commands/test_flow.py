"""Flow matching from training to figures, beside DDPM."""

import json
import os
from dataclasses import replace

import pytest
import torch
from support.configs import PLAIN_DIT, call, compose_config, config_of

from dcdit import evaluate, export, generate, sample
from dcdit.checkpoints.load import load_model, read_trained
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.process import build_process
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import GuidanceSettings, Heun
from dcdit.errors import UserError
from dcdit.sampling.generate import generate as generate_latents
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


TODAY = ("diffusion.prediction=x", "diffusion.velocity_cosine=1", "diffusion.shift=auto")


def test_a_network_that_predicts_the_image_from_training_to_pictures(tiny, flow, tmp_path, digits):
    run = tiny("image", *FLOW, *TODAY, "trainer.max_steps=2", "callbacks=fid", "callbacks.fid.count=40",
               "features@callbacks.fid.features=digits", "callbacks.fid.sampler.steps=2",
               "trainer.val_check_interval=2")  # fmt: skip
    logged = (run / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "train/velocity_cosine" in logged
    spec = load_model(run).process.spec
    # 64 elements of 8 x 8 x 1: the root of 64 / 4096
    assert {key: spec[key] for key in ("prediction", "velocity_cosine", "shift")} == {
        "prediction": "x", "velocity_cosine": 1.0, "shift": 0.125,
    }  # fmt: skip
    tiny("image", *FLOW, *TODAY, "trainer.max_steps=3", "ckpt_path=last", "callbacks=fid", "callbacks.fid=null")
    folder = call(export, compose_config(f"checkpoint={run}", f"out={tmp_path}/exported", name="export"))
    facts = json.loads((folder / "config.json").read_text())["diffusion"]
    assert facts["prediction"] == "image x_0"
    assert facts["velocity"] == "(x_t - x_0) / max(t, 0.05)"
    assert facts["time_shift"] == 0.125
    words = (f"checkpoint={folder}", "sampler=few", "sampler.steps=3", "guidance.scale=2", "sampler.cache=0.1")
    made = call(sample, compose_config(*words, "per_class=1", f"out={tmp_path}/pictures", name="sample"))
    assert {"samples.png", "latents.npz"} <= {path.name for path in made.iterdir()}
    points = ("features=digits", "count=40", f"reference={digits}/val", f"cache={tmp_path}/cache", "time_rounds=1")
    (measured,) = call(evaluate, compose_config(*words, *points, f"out={tmp_path}/figures", name="evaluate"))
    plan = json.loads(measured.path.read_text())["plan"]
    assert plan["sampler"] == {"name": "euler", "steps": 3, "clip": False, "cache": 0.1, "shift": 0.125}
    with pytest.raises(UserError, match="has a prediction of velocity noise - x_0, the checkpoint image x_0"):
        call(sample, compose_config(*words[:2], f"guidance.weak_checkpoint={flow}", "guidance.scale=2",
                                    f"out={tmp_path}/x", name="sample"))  # fmt: skip


def test_samples_of_a_predicted_image_are_those_of_its_velocity(flow, monkeypatch):
    by_velocity, by_image = load_model(flow), load_model(flow)
    plain = by_image.network.forward

    def predict_image(x, t, *arguments, **named):
        output = plain(x, t, *arguments, **named)
        velocity = output.prediction[:, : x.shape[1]]
        return replace(output, prediction=x - t[:, None, None, None] / 1000 * velocity)

    monkeypatch.setattr(by_image.network, "forward", predict_image)
    by_image = replace(by_image, process=build_process({"name": "flow", "prediction": "x", "shift": 2.0}))
    labels, options = torch.arange(4), {"seed": 0, "batch_size": 4}
    found = []
    for model, sampler in ((by_velocity, Sampler(Heun(4, shift=2.0))), (by_image, Sampler(Heun(4)))):
        guidance = Guidance(model.network, model.network.null_class, GuidanceSettings(scale=2.0))
        found += generate_latents(model, guidance, sampler, labels, range(4), **options)
    torch.testing.assert_close(found[1].latents, found[0].latents, rtol=1e-4, atol=1e-4)


def test_what_the_weights_were_trained_for_does_not_change_on_resume(tiny, flow):
    later = ("diffusion.time=logit_normal", "trainer.max_steps=6", f"ckpt_path={flow / 'checkpoints' / 'last.ckpt'}")
    with pytest.raises(UserError, match=r"diffusion\.shift=2: the run was trained with 1"):
        tiny("flow", *FLOW, *later, "diffusion.shift=2")
    with pytest.raises(UserError, match=r"optimizer\.name='muon': the run was trained with 'adamw'"):
        tiny("flow", *FLOW, *later, "optimizer=muon")
