"""Width gates: what is left out equals what is multiplied by zero, costs what is counted, and learns a share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import MODERN, perturb
from torch.utils.flop_counter import FlopCounterMode

from dcdit.compute.flops import Cost, count, gated_share
from dcdit.errors import UserError
from dcdit.network import build_network, execution
from dcdit.network.caching import TrajectoryCache
from dcdit.network.execution import hold_products_in, is_compiled, set_execution
from dcdit.network.gates import group_count

SIZES = {"grid": 8, "channels": 1, "num_classes": 5, "width": 32, "depth": 2, "heads": 4}
KINDS = {"dcdit": {"name": "dcdit", "groups": 4}, "dit": {"name": "dit"}}
STYLES = {"published": {}, "modern": {**MODERN, "width": 96, "heads": 3}}  # 256 hidden channels: in 2 groups


def network(kind="dcdit", style="published", gates=True, seed=0):
    torch.manual_seed(seed)
    net = build_network({**SIZES, **KINDS[kind], **STYLES[style], "gates": gates})
    perturb(net)
    if kind == "dcdit":
        with torch.no_grad():
            net.router.scorer[-1].bias.fill_(0.0)  # keeps about half
    return net.eval()


def set_gates(net, pattern):
    """Have the gates follow ``pattern`` (depth * (heads + groups)) at all timesteps."""
    with torch.no_grad():
        net.gates.router.weight.zero_()
        net.gates.router.bias.copy_(torch.where(torch.tensor(pattern), 3.0, -3.0))


def inputs(batch=3, timestep=400.0):
    torch.manual_seed(1)
    return torch.randn(batch, 1, 8, 8), torch.full((batch,), timestep), torch.arange(batch) % 5


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_gates_on_a_network_is_the_one_without(kind, style):
    gated = network(kind, style)
    set_gates(gated, [True] * gated.gates.router.out_features)
    plain = network(kind, style, gates=False)
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if not name.startswith("gates.")})
    with torch.no_grad():
        assert torch.equal(gated(*inputs()).prediction, plain(*inputs()).prediction)
    for parameter in gated.gates.parameters():  # multiplied by 1, as in training
        parameter.requires_grad_(True)
    assert torch.equal(gated(*inputs()).prediction, plain(*inputs()).prediction)


def test_a_fresh_network_has_all_gates_on_and_others_are_what_they_were():
    torch.manual_seed(0)
    fresh = build_network({**SIZES, **KINDS["dcdit"], "gates": True}).eval()
    with torch.no_grad():
        assert all(number == (4, 4) for number in fresh(*inputs()).gating.counts)
    torch.manual_seed(0)
    plain = build_network({**SIZES, **KINDS["dcdit"]})
    assert set(fresh.state_dict()) - set(plain.state_dict()) == {"gates.router.weight", "gates.router.bias"}
    for name, value in plain.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_what_is_left_out_equals_what_is_multiplied_by_zero(data):
    kind, style = data.draw(st.sampled_from(list(KINDS))), data.draw(st.sampled_from(list(STYLES)))
    net = network(kind, style)
    size = net.gates.router.out_features
    set_gates(net, data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    drops = (
        0.0
        if kind == "dit"
        else torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.6, 1.0]), min_size=3, max_size=3)))
    )
    with torch.no_grad():
        left_out = net(*inputs(), drops)
    multiplied = net(*inputs(), drops)  # with gradients nothing is left out
    assert left_out.gating.counts is not None
    assert multiplied.gating.counts is None
    torch.testing.assert_close(left_out.prediction, multiplied.prediction, rtol=1e-5, atol=1e-5)
    assert all(heads >= 1 and groups >= 1 for heads, groups in left_out.gating.counts)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_different_timesteps_have_gates_of_their_own(kind):
    net = network(kind)
    torch.manual_seed(3)
    torch.nn.init.normal_(net.gates.router.weight, std=3.0)
    torch.nn.init.zeros_(net.gates.router.bias)
    x, _, y = inputs(4)
    t = torch.tensor([10.0, 300.0, 600.0, 990.0])
    drops = torch.tensor([0.0, 1.0, 0.3, 0.0]) if net.routes else None  # one leaves the backbone out
    together = net(x, t, y, drops if net.routes else 0.0)
    assert together.gating.counts is None
    for sample in range(4):
        part = slice(sample, sample + 1)
        alone = net(x[part], t[part], y[part], drops[part] if net.routes else 0.0)
        assert torch.equal(alone.gating.heads[0], together.gating.heads[sample])
        torch.testing.assert_close(alone.prediction, together.prediction[part], rtol=1e-4, atol=1e-5)
    assert not torch.equal(together.gating.heads[0], together.gating.heads[3])


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 0.9])
def test_features_are_cached_and_room_is_bounded_as_ever(capacity):
    net, cache = network(), TrajectoryCache(1e-30, last=-1.0)
    set_gates(net, [True, False, True, False] * 4)
    exact = net(*inputs())
    for _ in range(2):
        output = net(*inputs(), 0.0, cache.step(0.0, (0,)), capacity)
    torch.testing.assert_close(output.prediction, exact.prediction, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_bf16_decides_the_same_with_weights_held_in_it():
    nets = network(), network()
    hold_products_in(nets[1], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (net(*inputs()) for net in nets)
    assert torch.equal(first.prediction, second.prediction)
    assert nets[1].gates.router.weight.dtype == torch.float32
    assert count(nets[1], [8.0]).total == pytest.approx(count(nets[0], [8.0]).total, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_flops_count_what_runs(data):
    style = data.draw(st.sampled_from(list(STYLES)))
    net, plain = network("dit", style), network("dit", style, gates=False)
    size = net.gates.router.out_features
    set_gates(net, data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))

    def measured(which):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = which(*inputs(1))
        return counter.get_total_flops(), output.gating

    (flops, gating), (whole, _) = measured(net), measured(plain)
    # torch counts no softmax, of which each head has 3 for a pair of tokens, and the embedding of t twice
    softmax = 3 * 16**2 * sum(net.gates.heads - heads for heads, _ in gating.counts)
    spared = Cost.of_network(plain).fixed - (Cost.of_network(net, gating).fixed - router_flops(net))
    embedding = 2 * sum(linear.weight.numel() for linear in (net.condition.time.fc1, net.condition.time.fc2))
    assert spared == pytest.approx(whole + router_flops(net) + embedding - flops + softmax, rel=1e-6)


def router_flops(net):
    return 2.0 * net.gates.router.weight.numel()


def test_the_share_is_that_of_a_double_loop():
    net = network("dcdit", "modern").train()
    output = net(*inputs())
    lengths, gating = torch.tensor([5, 0, 30]), output.gating
    ran = whole = 0.0
    for sample, tokens in enumerate(lengths.tolist()):
        for number, block in enumerate(net.backbone.blocks):
            attention, mlp = block.attention, block.mlp
            weights = [2 * tokens * part.weight.numel() for part in (attention.qkv, attention.out, mlp.fc1, mlp.fc2)]
            heads, groups = sum(weights[:2]) + 3 * (4 * 32 + 3) * tokens**2, sum(weights[2:])
            ran += (
                heads * gating.heads[sample, number].mean().item()
                + groups * gating.groups[sample, number].mean().item()
            )
            whole += heads + groups
    assert gated_share(net, gating, lengths).item() == pytest.approx(ran / whole, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_pulls_the_share_to_its_target_and_reaches_every_router(kind):
    net = network(kind).train()
    optimizer = torch.optim.Adam(net.gates.parameters(), lr=0.05)
    lengths = torch.full((8,), 16)
    for step in range(150):
        x, _, y = inputs(8)
        torch.manual_seed(step)
        output = net(x, torch.rand(8) * 1000, y)
        share = gated_share(net, output.gating, lengths)
        ((share - 0.5) ** 2).backward()
        if not step:
            gradient = net.gates.router.weight.grad.abs().amax(dim=1)
            assert (gradient > 0).all()
        optimizer.step()
        optimizer.zero_grad()
    heads, groups = net.gating_over_time().shares
    assert sum(heads + groups) / len(heads + groups) == pytest.approx(0.5, abs=0.15)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 4096))
def test_groups_divide_the_channels(heads, hidden):
    number = group_count(heads, hidden)
    assert hidden % number == 0
    assert number <= heads
    assert not any(hidden % other == 0 for other in range(number + 1, heads + 1))


def test_compiled_blocks_are_refused():
    net = network()
    net.check_compiled("compile", "auto")
    network(gates=False).check_compiled("compile", True)
    with pytest.raises(UserError, match=r"execution\.compile=true: width gates .* take execution\.compile=auto"):
        net.check_compiled("execution.compile", True)


def test_auto_leaves_large_networks_with_gates_uncompiled(monkeypatch):
    for name in ("has_amx", "has_compiler"):
        monkeypatch.setattr(execution, name, lambda *_: True)
    monkeypatch.setattr(execution, "_LARGE", 0)
    assert [is_compiled(network(gates=gates), "cpu", True, "auto") for gates in (False, True)] == [True, False]


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        net = network().train()
        set_execution(net, checkpointed=checkpointed)
        torch.manual_seed(0)
        net(*inputs()).prediction.square().mean().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_whole_network_of_fixed_length_is_one_graph():
    net = network()
    set_gates(net, [True, False] * (net.gates.router.out_features // 2))
    torch._dynamo.reset()  # after other drop fractions in this process, it takes them for symbols
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    expected, found = (each(*inputs(), capacity=0.9).prediction for each in (net, compiled))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
