"""Path drop: what a sample computes that leaves the backbone out, and that the others do not notice it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import MODERN, perturb

from dcdit.compute.flops import Cost, count
from dcdit.errors import UserError
from dcdit.network import DiT, build_network
from dcdit.network.blocks import DiTBlock
from dcdit.network.caching import TrajectoryCache
from dcdit.network.routing import route

SIZES = {"name": "dcdit", "groups": 4, "grid": 8, "channels": 1, "num_classes": 5, "width": 32, "depth": 2, "heads": 2}


def network(**options):
    torch.manual_seed(0)
    net = build_network({**SIZES, **options})
    perturb(net)
    with torch.no_grad():
        net.router.scorer[-1].bias.fill_(0.0)  # keeps about half
    return net


def inputs(batch):
    torch.manual_seed(1)
    return torch.randn(batch, 1, 8, 8), torch.linspace(3, 900, batch), torch.arange(batch) % 5


def without_backbone(net, x, t, y):
    """The prediction of the encoder, the residual projection, the decoder and the output alone."""
    c = net.condition(t, y)
    features = net.encoder(net.embed(x), c)
    decoded = net.decoder(net.residual(features).permute(0, 3, 1, 2), c)
    return net.output(decoded.flatten(1, 2), c).transpose(1, 2).unflatten(2, net.grid)


def tokens_run(net, *arguments, **options):
    """The output, and how many tokens the first block was given; None if it did not run."""
    seen = []
    block = next(module for module in net.modules() if isinstance(module, DiTBlock))
    hook = block.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    try:
        return net(*arguments, **options), (seen or [None])[0]
    finally:
        hook.remove()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]), min_size=1, max_size=5), st.data())
def test_only_a_fraction_of_one_keeps_no_token(fractions, data):
    prob = torch.rand(len(fractions), 20, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    kept = route(prob, torch.tensor(fractions)).mask.sum(dim=1).tolist()
    assert [number > 0 for number in kept] == [fraction < 1 for fraction in fractions]
    for sample, fraction in enumerate(fractions):
        assert int(route(prob, fraction).mask[sample].sum()) == kept[sample]


@pytest.mark.parametrize("training", [True, False], ids=["training", "sampling"])
@pytest.mark.parametrize("capacity", [None, 0.9])
@pytest.mark.parametrize("options", [{}, MODERN], ids=["published", "modern"])
def test_a_sample_without_tokens_is_that_of_a_network_without_backbone(options, capacity, training):
    net = network(**options).train(training)
    x, t, y = inputs(4)
    drops = torch.tensor([0.0, 1.0, 0.4, 1.0])
    output, ran = tokens_run(net, x, t, y, drops, capacity=capacity)
    if capacity is None:
        assert ran == output.routing.mask.sum(), "only the tokens of the others ran"
    apart = without_backbone(net, x, t, y)
    whole = net(x, t, y, torch.tensor([0.0, 0.0, 0.4, 0.4])).prediction
    for sample in range(4):
        expected = apart if drops[sample] == 1 else whole
        torch.testing.assert_close(output.prediction[sample], expected[sample], rtol=1e-5, atol=1e-5)
    assert (apart - whole).abs().flatten(1).amax(dim=1).min() > 1e-3
    full = net(x, t, y)
    assert torch.equal(output.routing.prob, full.routing.prob)  # the ratio loss is what it was
    assert torch.equal(output.routing.natural_mask, full.routing.natural_mask)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 0.9])
def test_a_batch_without_any_token(capacity):
    net = network().eval()
    x, t, y = inputs(3)
    for drops in (1.0, torch.ones(3)):
        output, ran = tokens_run(net, x, t, y, drops, capacity=capacity)
        torch.testing.assert_close(output.prediction, without_backbone(net, x, t, y), rtol=1e-5, atol=1e-5)
        assert not output.routing.mask.any()
        assert ran is None or capacity, "no block ran"


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch():
    net = network().eval()
    x, t, y = inputs(6)
    drops = torch.tensor([0.0, 1.0, 0.6, 1.0, 0.2, 0.9])
    together = net(x, t, y, drops).prediction
    for sample in range(6):
        part = slice(sample, sample + 1)
        alone = net(x[part], t[part], y[part], drops[part]).prediction
        torch.testing.assert_close(together[part], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, MODERN], ids=["published", "modern"])
def test_every_parameter_has_a_gradient_whoever_is_left_out(options):
    """Of processes that train together, each waits for the gradients of all parameters."""
    net = network(**options).train()
    x, t, y = inputs(3)
    for drops, learns in ((torch.ones(3), False), (torch.tensor([1.0, 0.0, 1.0]), True)):
        net.zero_grad(set_to_none=True)
        net(x, t, y, drops).prediction.square().mean().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        largest = max(float(parameter.grad.abs().max()) for parameter in net.backbone.parameters())
        assert (largest > 0) is learns


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 0.9])
def test_features_from_before_the_backbone_was_left_out_are_not_reused(capacity):
    net, cache = network().eval(), TrajectoryCache(1e6, last=-1.0)  # reuses whatever it may
    x, t, y = inputs(3)
    for drops in ([0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.4, 0.0], [0.0, 0.4, 1.0]):
        drop = torch.tensor(drops)
        output = net(x, t, y, drop, cache.step(0.0, (0,)), capacity)
        exact = net(x, t, y, drop).prediction
        torch.testing.assert_close(output.prediction, exact, rtol=1e-4, atol=1e-4)
    assert output.routing.mask.any(dim=1).tolist() == [False, False, False]  # two reuse, one is left out


def test_what_is_left_out_costs_neither_backbone_nor_dechunk():
    net = network()
    parts = count(net, [16.0]).components
    rest = sum(flops for name, flops in parts.items() if name not in ("backbone", "de-chunk"))
    assert Cost.of_network(net).of(torch.tensor([0.0])).item() == pytest.approx(rest)
    assert count(net, [0.0]).total == pytest.approx(rest)
    assert count(net, [0.0, 16.0]).total == pytest.approx((rest + count(net, [16.0]).total) / 2)


def test_a_network_without_router_has_no_path_to_drop():
    with pytest.raises(UserError, match="DiT/2 drops no tokens"):
        DiT(8, 1, 5, 32, 2, 2)(*inputs(2), 1.0)
