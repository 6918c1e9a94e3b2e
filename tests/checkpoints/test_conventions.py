"""Weights of flow matching that SiT's and REPA's code trained: the same names, another time and direction."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.configs import call, compose_config
from support.foreign import small_dit

from dcdit import DCDiT, sample
from dcdit.checkpoints.export import Card, write_exported
from dcdit.checkpoints.foreign import reference_state
from dcdit.checkpoints.load import load_model, read_weights
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.checkpoints.settings import CONVENTIONS, AssumeSettings
from dcdit.diffusion.samplers import Sampler, sample_generator
from dcdit.diffusion.settings import Euler, GuidanceSettings
from dcdit.errors import UserError
from dcdit.network.embeddings import PURE_NOISE, TimestepEmbedding
from dcdit.sampling.generate import generate
from dcdit.sampling.guiding import guidance_of

HEADS = AssumeSettings(heads=4)
LABELS = torch.tensor([1, 5, 0])


def said(diffusion: str) -> AssumeSettings:
    return AssumeSettings(heads=4, diffusion=diffusion)


@pytest.fixture(params=[True, False], ids=["with variance", "velocity alone"])
def state(request):
    """A state dict by DiT's names, and the network as its program runs it: told the time as it stands."""
    network = small_dit(variance=request.param)
    return reference_state(network), network


def noise(count: int = len(LABELS), seed: int = 3) -> torch.Tensor:
    return torch.cat([torch.randn(1, 4, 8, 8, generator=sample_generator(seed, i)) for i in range(count)])


@torch.no_grad()
def sampled_by_sit(network, steps: int) -> torch.Tensor:
    """SiT's own convention: dx/dt = v from noise at t = 0 to the image at t = 1."""
    x = noise()
    for step in range(steps):
        t = torch.full((len(x),), step / steps)
        x = x + network(x, t, LABELS).prediction[:, :4] / steps
    return x


@torch.no_grad()
def sampled_by_repa(network, steps: int) -> torch.Tensor:
    """REPA's convention: dx/dt = v from noise at t = 1 to the image at t = 0."""
    x = noise()
    for step in range(steps, 0, -1):
        t = torch.full((len(x),), step / steps)
        x = x - network(x, t, LABELS).prediction[:, :4] / steps
    return x


def sampled(model, steps: int, scale: float = 1.0) -> torch.Tensor:
    guidance = guidance_of(model, GuidanceSettings(scale=scale), None)
    batches = generate(model, guidance, Sampler(Euler(steps)), LABELS, range(3), seed=3, batch_size=3)
    return torch.cat([batch.latents for batch in batches])


PROGRAMS = pytest.mark.parametrize(("diffusion", "by"), [("flow_sit", sampled_by_sit), ("flow_repa", sampled_by_repa)])


@PROGRAMS
def test_both_programs_make_the_same_latents(tmp_path, state, diffusion, by):
    weights, network = state
    torch.save(weights, tmp_path / "x.pt")
    model = load_model(tmp_path / "x.pt", assume=said(diffusion))
    expected = by(network, 7)
    x, t = noise(), torch.tensor([0.0, 400.0, 1000.0])
    own, sign = (1 - t / 1000, -1) if diffusion == "flow_sit" else (t / 1000, 1)
    with torch.no_grad():
        ours, theirs = model.network(x, t, LABELS).prediction, network(x, own, LABELS).prediction
    torch.testing.assert_close(ours[:, :4], sign * theirs[:, :4], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[:, 4:], theirs[:, 4:], rtol=0, atol=1e-5)  # the variance, where there is one
    torch.testing.assert_close(sampled(model, 7), expected, rtol=0, atol=1e-5)
    for other in set(CONVENTIONS) - {diffusion, "ddpm"}:
        wrong = sampled(load_model(tmp_path / "x.pt", assume=said(other)), 7)
        assert (wrong - expected).abs().max() > 1e-2


@PROGRAMS
def test_the_convention_stays_in_every_form_of_the_weights(tmp_path, state, diffusion, by):
    weights, network = state
    save_file(weights, tmp_path / "x.safetensors")
    read = read_weights(resolve_checkpoint(str(tmp_path / "x.safetensors"), "runs"), said(diffusion))
    write_exported(tmp_path / "out", read, "ema", "fp32", Card("none", "", [], ""))
    exported = load_model(tmp_path / "out")
    torch.testing.assert_close(sampled(exported, 5), by(network, 5), rtol=0, atol=1e-5)
    back = reference_state(exported.network)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_the_command_samples_weights_of_sit(tmp_path, state):
    weights, network = state
    torch.save(weights, tmp_path / "x.pt")
    words = (
        f"checkpoint={tmp_path}/x.pt",
        "assume.heads=4",
        "assume.diffusion=flow_sit",
        "assume.autoencoder=identity",
    )
    more = ("sampler=euler", "sampler.steps=6", "guidance.scale=1", "classes=[1,5,0]", "per_class=1", "seed=3")
    out = call(sample, compose_config(*words, *more, f"out={tmp_path}/out", name="sample"))
    with np.load(out / "latents.npz") as file:
        latents = torch.from_numpy(file["latents"])
    torch.testing.assert_close(latents, sampled_by_sit(network, 6), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_dcdit_of_another_time_is_the_same_function_of_its_own_time():
    sizes = {"grid": 8, "channels": 4, "num_classes": 5, "width": 32, "depth": 1, "heads": 2, "groups": 8}
    networks = {}
    for time_input in ("steps", "unit", "reversed"):
        torch.manual_seed(0)
        networks[time_input] = DCDiT(**sizes, encoder_width=16, time_input=time_input).eval()
        torch.nn.init.normal_(networks[time_input].output.linear.weight)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([130.0, 920.0]), torch.tensor([0, 4])
    for time_input, own in (("unit", t / 1000), ("reversed", 1 - t / 1000)):
        expected = networks["steps"](x, own, y).prediction
        torch.testing.assert_close(networks[time_input](x, t, y).prediction, expected, rtol=0, atol=1e-6)
        assert networks[time_input].spec["time_input"] == time_input


def test_pure_noise_is_the_last_time_of_the_process():
    from dcdit.diffusion.settings import TRAIN_STEPS

    assert PURE_NOISE == TRAIN_STEPS
    embedding = TimestepEmbedding(8, time_input="reversed")
    zero = TimestepEmbedding(8)
    zero.load_state_dict(embedding.state_dict())
    assert torch.equal(embedding(torch.tensor([1000.0])), zero(torch.tensor([0.0])))


def test_what_nobody_said_is_told_with_both_programs(tmp_path, state, caplog):
    weights, network = state
    torch.save(weights, tmp_path / "x.pt")
    if network.variance:
        load_model(tmp_path / "x.pt", assume=HEADS)
        assert "assume.diffusion=flow_sit or flow_repa" in caplog.text
    else:
        with pytest.raises(UserError, match=r"assume\.diffusion=flow_sit, flow_repa or flow says so"):
            load_model(tmp_path / "x.pt", assume=HEADS)


def test_the_heads_that_repa_aligns_features_with_are_left_out(tmp_path, state):
    weights, network = state
    heads = {f"projectors.0.{layer}.{kind}": torch.ones(3) for layer in (0, 2) for kind in ("weight", "bias")}
    torch.save({"ema": {**weights, **heads}, "args": None, "steps": 3}, tmp_path / "x.pt")
    model = load_model(tmp_path / "x.pt", assume=said("flow_repa"))
    torch.testing.assert_close(sampled(model, 3), sampled_by_repa(network, 3), rtol=0, atol=1e-5)
