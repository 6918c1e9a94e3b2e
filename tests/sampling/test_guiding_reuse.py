"""The guiding branch at every k-th evaluation: what is reused, what it costs, and that every trajectory begins anew."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import perturb

from dcdit.checkpoints.load import Model
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.guidance import Guidance, guide
from dcdit.diffusion.process import build_process
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import GuidanceSettings, Heun
from dcdit.network import DCDiT
from dcdit.sampling.capacity import measure_kept
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.generate import generate

LATENTS = LatentSpec((1, 8, 8), IDENTITY, 1.0, 0.0, tuple("abcde"))


@settings(max_examples=40, deadline=None)
@given(
    every=st.integers(1, 5),
    interval=st.one_of(st.none(), st.tuples(st.integers(0, 4), st.integers(5, 12)).map(list)),
    two_networks=st.booleans(),
)
def test_predictions_of_the_guiding_branch_serve_the_next_evaluations(every, interval, two_networks):
    calls = []

    def network(x, t, y, drop):
        """Predicts 100 t, and the class in the second digit; notes who asked when."""
        guiding = y == 5
        calls.append((int(t[0]), bool(guiding.any())))
        prediction = (100 * t + y)[:, None, None, None].expand_as(x)
        return SimpleNamespace(prediction=prediction, routing=None, change=None, gating=None)

    guiding = network if two_networks else None
    values = GuidanceSettings(scale=3.0, every=every, interval=interval)
    guidance = Guidance(network, 5, values, guiding).for_trajectory(None)
    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
    last, guided = None, 0
    for t in range(10, -1, -1):
        calls.clear()
        found = guidance(x, float(t), y).prediction
        main = (100.0 * t + y)[:, None, None, None].expand_as(x)
        if interval is not None and not interval[0] <= t <= interval[1]:
            assert torch.equal(found, main)
            continue
        ran = any(null for _, null in calls)
        assert ran is (guided % every == 0)
        last, guided = (t if ran else last), guided + 1
        torch.testing.assert_close(found, guide(main, torch.full_like(x, 100.0 * last + 5), 3.0, 1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = DCDiT(grid=8, channels=1, num_classes=5, width=32, depth=2, heads=2, groups=4)
    perturb(net)
    with torch.no_grad():
        net.router.scorer[-1].bias.fill_(0.0)  # keeps about half
    return Model(net.eval(), LATENTS, 0, build_process({"name": "flow"}))


def sample(model, count=8, batch_size=8, cache=0.0, **values):
    guidance = Guidance(model.network, 5, GuidanceSettings(**values))
    sampler, labels = Sampler(Heun(4, clip=True, cache=cache)), torch.arange(64) % 5
    return list(generate(model, guidance, sampler, labels, range(count), seed=0, batch_size=batch_size))


@pytest.mark.parametrize("cache", [0.0, 0.5])
@pytest.mark.parametrize("values", [{}, {"uncond_drop_fraction": 0.6}, {"interval": [100, 900]}])
def test_an_image_does_not_depend_on_its_batch(model, cache, values):
    whole, alone = (
        torch.cat(
            [batch.latents for batch in sample(model, cache=cache, scale=2.0, every=3, batch_size=size, **values)]
        )
        for size in (8, 1)
    )
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(whole, torch.cat([batch.latents for batch in sample(model, scale=2.0, **values)]))


def test_flops_are_those_of_the_branches_that_ran(model):
    every = SamplingCost.total(map(SamplingCost.of, sample(model, scale=2.0, every=3)))
    assert [tokens is not None for tokens in every.guiding] == [True, False, False, True, False, False, True]
    usual = SamplingCost.total(map(SamplingCost.of, sample(model, scale=2.0)))
    assert every.flops / usual.flops == pytest.approx((1 + 3 / 7) / 2, rel=0.05)


def test_room_is_measured_for_a_branch_that_runs_now_and_then(model):
    """Heun's method asks twice at one time, and the guiding branch may run at either."""
    guidance, sampler = Guidance(model.network, 5, GuidanceSettings(scale=2.0, every=3)), Sampler(Heun(4, clip=True))
    room = measure_kept(model, guidance, sampler, 8, "fp32").room(sampler.timesteps)
    for evaluation in (0, 3, 6):
        assert all(share for share in room(sampler.timesteps[evaluation]))
    assert room(sampler.timesteps[1])[0]
