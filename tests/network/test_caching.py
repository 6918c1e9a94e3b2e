"""Feature caching: who reuses, that it is the same for any batch, and what it costs."""

import pytest
import torch

from dcdit.compute.flops import Cost, count
from dcdit.errors import UserError
from dcdit.network import DiT, build_network
from dcdit.network.caching import CachedStep, FeatureCache, TrajectoryCache

SPEC = {
    "name": "dcdit", "grid": 8, "channels": 2, "num_classes": 3, "width": 32, "depth": 2, "heads": 2, "groups": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = build_network(SPEC).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # some begin at zero
            parameter += 0.05 * torch.randn_like(parameter)
    return net


def inputs(batch: int, step: float):
    """Samples that change by ``step`` times a number of their own."""
    x = torch.randn(batch, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    speed = torch.linspace(0.0, 1.0, batch)[:, None, None, None]
    moved = x + step * speed * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return moved, torch.full((batch,), 500.0 - step), torch.arange(batch) % 3


def walk(network, batch, threshold, steps, rows=slice(None)):
    """Predictions and kept tokens of each step of a slow walk."""
    cache, found = TrajectoryCache(threshold, last=-1.0), []
    for number, step in enumerate(steps):
        x, t, y = (each[rows] for each in inputs(batch, step))
        last = -1.0 if number == len(steps) - 1 else 0.0
        output = network(x, t, y, 0.3, cache.step(last, (0,)))
        found.append((output.prediction, output.routing.mask.sum(dim=1)))
    return found


STEPS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)


@torch.no_grad()
def test_changes_add_up_until_the_backbone_runs_again():
    features = torch.ones(3, 4, 2)
    cache = FeatureCache(0.25)
    growth = torch.tensor([0.0, 0.1, 0.3])[:, None, None]
    seen = [cache.reuse(features * (1 + growth) ** step, last=step == 5)[0] for step in range(6)]
    assert torch.stack(seen).int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]
    broken = FeatureCache(10.0)
    broken.reuse(torch.zeros(1, 4, 2), last=False)
    assert not broken.reuse(torch.zeros(1, 4, 2), last=False)[0].any()  # no change can be told: computed


@torch.no_grad()
def test_a_tiny_threshold_gives_the_bits_of_no_cache(network):
    for (prediction, kept), step in zip(walk(network, 4, 1e-30, STEPS[1:]), STEPS[1:], strict=True):
        output = network(*inputs(4, step), 0.3)
        assert torch.equal(prediction, output.prediction)
        assert torch.equal(kept, output.routing.mask.sum(dim=1))


@torch.no_grad()
def test_samples_reuse_what_they_had_and_the_others_are_computed(network):
    whole = walk(network, 5, 0.06, STEPS)
    ran = torch.stack([kept > 0 for _, kept in whole])
    assert ran[0].all()
    assert ran[-1].all()
    assert 0 < ran[1:-1].float().mean() < 1
    assert not ran[1:-1, 0].any(), "a sample that stands still reuses all along"
    for number, step in enumerate(STEPS):
        exact = network(*inputs(5, step), 0.3).prediction
        difference = (whole[number][0] - exact).abs().flatten(1).amax(dim=1)
        assert (difference[ran[number]] < 1e-5).all()
        moving = ~ran[number] & (torch.arange(5) > 0)
        assert (difference[moving] > 1e-5).all(), "what is reused is not what would be computed"


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(network):
    whole = walk(network, 5, 0.06, STEPS)
    for sample in range(5):
        alone = walk(network, 5, 0.06, STEPS, rows=slice(sample, sample + 1))
        for (prediction, kept), (one, its) in zip(whole, alone, strict=True):
            assert kept[sample] == its
            torch.testing.assert_close(prediction[sample], one[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_halves_keep_apart_and_one_may_rest(network):
    """The guiding branch joins later and leaves again, as with an interval; the main one is as it is alone."""
    cache, alone = TrajectoryCache(0.06, last=-1.0), TrajectoryCache(0.06, last=-1.0)
    for number, step in enumerate(STEPS):
        x, t, y = inputs(4, step)
        expected = network(x, t, y, 0.0, alone.step(0.0, (0,)))
        if number in (1, 2, 4):
            both = network(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, y * 0 + 3]), 0.0, cache.step(0.0, (0, 1)))
            main, guiding = both.prediction.chunk(2)
            kept = both.routing.mask[4:].sum(dim=1)
            if number == 1:
                assert (kept > 0).all()  # it has nothing yet
                torch.testing.assert_close(guiding, network(x, t, y * 0 + 3).prediction, rtol=1e-4, atol=1e-5)
        else:
            main = network(x, t, y, 0.0, cache.step(0.0, (0,))).prediction
        torch.testing.assert_close(main, expected.prediction, rtol=1e-4, atol=1e-5)


def test_what_is_reused_costs_neither_backbone_nor_dechunk(network):
    cost = Cost.of_network(network)
    flops = count(network, [16.0])
    rest = flops.total - flops.components["backbone"] - flops.components["de-chunk"]
    assert cost.of(torch.tensor([0, 16])).tolist() == pytest.approx([rest, flops.total])


def test_a_network_without_cache_says_so():
    dit = DiT(8, 2, 3, 32, 2, 2)
    with pytest.raises(UserError, match="DiT/2 computes every step"):
        dit(*inputs(2, 0.0), 0.0, CachedStep((FeatureCache(0.1),), last=False))
