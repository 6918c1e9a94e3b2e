"""A packed sequence of fixed length: the same results while it has room, and no read by the host."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import MODERN, perturb
from support.pretend_cuda import PretendCuda

from dcdit.network import build_network
from dcdit.network.caching import TrajectoryCache
from dcdit.network.packing import make_packing, make_static_packing, static_size
from dcdit.network.routing import route

SIZES = {"name": "dcdit", "groups": 4, "grid": 8, "channels": 1, "num_classes": 5, "width": 32, "depth": 2, "heads": 2}


def network(seed=0, **options):
    torch.manual_seed(seed)
    net = build_network({**SIZES, **options})
    perturb(net)
    return net.eval()


def inputs(batch=4):
    torch.manual_seed(1)
    return torch.randn(batch, 1, 8, 8), torch.linspace(3, 900, batch), torch.arange(batch) % 5


def masks(draw, batch, positions):
    bits = draw(st.lists(st.booleans(), min_size=batch * positions, max_size=batch * positions))
    mask = torch.tensor(bits).view(batch, positions)
    mask[:, 0] = mask[:, -1] = True
    return mask


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_padding_stands_after_the_kept_tokens_in_segments_of_its_own(data):
    batch, positions = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 12))
    mask = masks(data.draw, batch, positions)
    kept = int(mask.sum())
    size = data.draw(st.integers(kept, batch * positions + 3))
    exact, static = make_packing(mask), make_static_packing(mask, size)
    assert len(static.index) == len(static.sample) == size
    assert torch.equal(static.index[:kept], exact.index)
    assert torch.equal(static.sample[:kept], exact.sample)
    assert torch.equal(static.cu_seqlens[: batch + 1], exact.cu_seqlens)
    assert static.valid.sum() == kept == static.valid.nonzero().max() + 1
    assert static.cu_seqlens[-1] == size
    assert static.cu_seqlens.diff().min() >= 0
    assert static.cu_seqlens.diff().max() <= positions


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_forward_pass_with_room_equals_the_exact_one(data):
    net = network(data.draw(st.integers(0, 5)), **data.draw(st.sampled_from([{}, MODERN])))
    batch, drop = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0.0, 0.4, 0.8]))
    with torch.no_grad():
        exact = net(*inputs(batch), drop)
        capacity = data.draw(st.floats(float(exact.routing.mask.float().mean()), 1.0))
        static = net(*inputs(batch), drop, capacity=capacity)
    assert torch.equal(exact.routing.mask, static.routing.mask)
    assert static.routing.beyond.tolist() == [0] * batch
    # Products of other sizes round differently; nothing else may differ.
    torch.testing.assert_close(static.prediction, exact.prediction, rtol=1e-5, atol=2e-6)


def test_gradients_with_room_equal_the_exact_ones():
    net = network()
    gradients = []
    for capacity in (None, 1.0):
        net.zero_grad()
        net(*inputs(), 0.2, capacity=capacity).prediction.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None])
    for exact, static in zip(*gradients, strict=True):
        torch.testing.assert_close(static, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_what_is_beyond_the_capacity_are_the_least_certain_tokens_of_the_batch(data):
    batch, positions = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 10))
    levels = data.draw(
        st.lists(st.sampled_from([0.1, 0.6, 0.7, 0.9, 1.0]), min_size=batch * positions, max_size=batch * positions)
    )
    routing = route(torch.tensor(levels).view(batch, positions))
    capacity = data.draw(st.integers(2 * batch, batch * positions))
    within = routing.within(capacity)
    assert within.mask.sum() == min(capacity, int(routing.mask.sum()))
    assert torch.equal(within.beyond, routing.mask.sum(1) - within.mask.sum(1))
    assert within.of(slice(1)).beyond.tolist() == within.beyond[:1].tolist()
    assert not (within.mask & ~routing.mask).any()
    assert within.mask[:, 0].all()
    assert within.mask[:, -1].all()
    inner = torch.zeros_like(routing.mask)
    inner[:, 1:-1] = True
    dropped = routing.prob[routing.mask & ~within.mask & inner]
    kept = routing.prob[within.mask & inner]
    assert not len(dropped) or not len(kept) or dropped.max() <= kept.min()
    if capacity < batch * positions:
        assert not (within.mask & ~routing.within(capacity + 1).mask).any(), "smaller capacities keep a subset"


def test_sizes_are_multiples_of_128_and_no_more_than_all_positions():
    assert static_size(0.25, 8, 1024) == 2048
    assert static_size(0.2501, 8, 1024) == 2176
    assert static_size(1.0, 2, 36) == 72
    assert static_size(0.001, 8, 1024) == 128
    assert static_size(0.001, 100, 1024) == 256


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cached", [False, True])
def test_the_host_reads_nothing(precision, cached):
    with PretendCuda() as device:
        net = network().to("cuda")
        x, t, y = (each.to("cuda") for each in inputs())
        cache = TrajectoryCache(0.5, 0.0)
        device.reads.clear()
        device.copies.clear()
        for step in range(2):
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                output = net(x, t, y, 0.3, cache.step(900 - step, (0,)) if cached else None, 0.9)
        output.prediction.float().square().mean().backward() if not cached else None
        assert not device.reads, device.reads
        assert not device.copies


def test_feature_caching_with_room_equals_the_exact_one():
    net = network()
    x, t, y = inputs()
    moves = torch.tensor([0.0, 0.05, 0.2, 1.0]).view(4, 1, 1, 1) * torch.randn_like(x)
    outputs = []
    for capacity in (None, 1.0):
        cache = TrajectoryCache(0.3, 0.0)
        with torch.no_grad():
            outputs.append([net(x + k * moves, t, y, 0.0, cache.step(900 - k, (0,)), capacity) for k in range(6)])
    reused = [output.routing.mask.sum(1) == 0 for output in outputs[0]]
    assert any(some.any() for some in reused)
    assert any(not some.all() for some in reused[1:])
    for exact, static in zip(*outputs, strict=True):
        assert torch.equal(exact.routing.mask, static.routing.mask)
        torch.testing.assert_close(static.prediction, exact.prediction, rtol=1e-5, atol=1e-6)


def test_the_whole_network_compiles_as_one_graph():
    net = network()
    with torch.no_grad():
        expected = net(*inputs(), 0.3, capacity=0.9).prediction
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs(), 0.3, capacity=0.9).prediction, expected, rtol=1e-5, atol=1e-5)
