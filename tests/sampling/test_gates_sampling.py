"""Sampling with width gates: what runs is what is counted, whatever the batch, and budgets are met beside them."""

from dataclasses import replace

import pytest
import torch
from support.configs import perturb

from dcdit.checkpoints.load import Model
from dcdit.compute.flops import Cost, count, least_and_most
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.process import build_process
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import BudgetSettings, GuidanceSettings, Heun
from dcdit.network import DCDiT, DiT
from dcdit.network.gates import Gating
from dcdit.sampling.budget import calibrate
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.generate import generate
from dcdit.sampling.guiding import guidance_of

LATENTS = LatentSpec((1, 8, 8), IDENTITY, 1.0, 0.0, tuple("abcde"))
SIZES = {"grid": 8, "channels": 1, "num_classes": 5, "width": 32, "depth": 2, "heads": 4}
SAMPLER = Sampler(Heun(6, clip=True))
GUIDED = GuidanceSettings(scale=2.0, drop_fraction=0.2, uncond_drop_fraction=0.5, interval=[100, 900])


def model(kind=DCDiT, seed=0, gates=True):
    torch.manual_seed(seed)
    net = kind(**SIZES, **({"groups": 4} if kind is DCDiT else {}), gates=gates)
    perturb(net)
    if kind is DCDiT:
        with torch.no_grad():
            net.router.scorer[-1].bias.fill_(0.0)  # keeps about half
    if gates:  # that follow the timestep
        torch.nn.init.normal_(net.gates.router.weight, std=4.0)
        torch.nn.init.zeros_(net.gates.router.bias)
    return Model(net.eval(), LATENTS, 0, build_process({"name": "flow"}))


def sample(model, settings, guiding=None, sampler=SAMPLER, batch_size=8, samples=8, on_step=None):
    labels = torch.arange(64) % 5
    guidance = guidance_of(model, settings, guiding)
    return list(
        generate(model, guidance, sampler, labels, range(samples), seed=0, batch_size=batch_size, on_step=on_step)
    )


@pytest.mark.parametrize("cache", [0.0, 0.2])
@pytest.mark.parametrize(
    "settings", [GuidanceSettings(), GUIDED, replace(GUIDED, every=2)], ids=["plain", "lite", "every"]
)
def test_an_image_does_not_depend_on_its_batch(settings, cache):
    sampler = Sampler(replace(SAMPLER.settings, cache=cache))
    whole = torch.cat([batch.latents for batch in sample(model(), settings, sampler=sampler)])
    alone = torch.cat([batch.latents for batch in sample(model(), settings, sampler=sampler, batch_size=1)])
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [DCDiT, DiT])
def test_each_step_costs_what_its_gates_let_run(kind):
    gated, steps = model(kind), []
    (batch,) = sample(gated, GuidanceSettings(scale=2.0), on_step=lambda numbers, step: steps.append(step.timestep))
    for flops, lengths, timestep in zip(batch.step_flops, batch.lengths, steps, strict=True):
        with torch.no_grad():
            gating = gated.network(torch.zeros(1, 1, 8, 8), torch.tensor([timestep]), torch.tensor([0])).gating
        cost = Cost.of_network(gated.network, Gating(gating.heads, gating.groups))  # counted from the gates
        kept = [torch.zeros(8) if branch is None else branch for branch in lengths]
        torch.testing.assert_close(flops, cost.of(kept[0]) + cost.of(kept[1]))
    plain = Cost.of_network(model(kind, gates=False).network)
    assert len({flops[0].item() for flops in batch.step_flops}) > 2
    assert batch.flops.sum() < (len(steps) * 2 * plain.of(torch.full((8,), 64.0))).sum()


def test_each_branch_pays_for_its_own_gates():
    own, other = model(), model(seed=1, gates=False)
    settings = GuidanceSettings(scale=2.0, weak_checkpoint="other")
    for main, guiding in ((own, other), (other, own)):
        steps = []
        (batch,) = sample(main, settings, guiding, on_step=lambda numbers, step, into=steps: into.append(step))
        for flops, step, lengths in zip(batch.step_flops, steps, batch.lengths, strict=True):
            costs = [
                Cost.of_network(each.network, gating).of(kept)
                for each, gating, kept in zip((main, guiding), step.output.gatings, lengths, strict=True)
            ]
            torch.testing.assert_close(flops, sum(costs))
            assert [gating is None for gating in step.output.gatings] == [main is other, guiding is other]


@pytest.mark.parametrize("by", ["drop", "cache", "both"])
def test_a_budget_is_met_beside_gates(by):
    gated, sampler = model(), Sampler(Heun(8, clip=True))
    guidance = guidance_of(gated, GuidanceSettings(scale=2.0), None)
    found = calibrate(gated, guidance, sampler, BudgetSettings(fraction=0.9, by=by), 16, "fp32")
    full = SamplingCost.total(map(SamplingCost.of, sample(gated, guidance.settings, sampler=sampler, samples=16)))
    assert found.full_tflops == pytest.approx(full.tflops_per_image, rel=0.03)
    assert found.tflops == pytest.approx(0.9 * full.tflops_per_image, rel=0.04)


def test_the_mean_over_timesteps_lies_between_the_cheapest_and_the_dearest():
    net = model().network
    least, most = least_and_most(net, [20.0])
    assert least < count(net, [20.0]).total < most
    whole = count(model(gates=False).network, [20.0]).total
    assert most <= whole + 2 * net.gates.router.weight.numel()
    assert least_and_most(model(gates=False).network, [20.0]) is None
