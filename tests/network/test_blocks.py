"""What the blocks consist of: norms, MLPs and rotary positions, against definitions and other libraries' modules."""

from itertools import product

import diffusers.models.normalization
import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import MODERN, perturb

from dcdit.checkpoints.names import NAME_MAPS
from dcdit.errors import UserError
from dcdit.network import build_network
from dcdit.network.attention import packed_attention
from dcdit.network.blocks import Attention, DiTBlock
from dcdit.network.layers import MLPS, NORMS, BlockStyle, SwiGLU, rms_norm
from dcdit.network.packing import full_packing, make_packing, make_static_packing
from dcdit.network.rotary import Rotary, rotate
from dcdit.runtime.devices import without_memory
from dcdit.training.distillation import record_hidden_states

SIZES = {"grid": 8, "channels": 4, "num_classes": 5, "width": 64, "depth": 2, "heads": 4}
NETWORKS = {"dcdit": {"name": "dcdit", "groups": 8, **SIZES}, "dit": {"name": "dit", **SIZES}}


def network(name, **options):
    torch.manual_seed(0)
    net = build_network({**NETWORKS[name], **options})
    perturb(net)
    if net.routes:
        torch.nn.init.zeros_(net.router.scorer[3].bias)
    return net.eval()


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.randint(1000, (batch,), generator=generator), torch.randint(5, (batch,), generator=generator)


def drawn_mask(data, batch, positions):
    bits = data.draw(st.lists(st.booleans(), min_size=batch * positions, max_size=batch * positions))
    mask = torch.tensor(bits).view(batch, positions)
    mask[:, 0] = True
    return mask


def turned(x, side, patch=1):
    """The definition, by complex numbers, of dense ``x`` (B, L, heads, d) on a square grid; float64."""
    channels = x.shape[-1]
    found = torch.empty(*x.shape[:-1], channels // 2, dtype=torch.complex128)
    for position, pair in product(range(side**2), range(channels // 2)):
        coordinate = position // side if pair < channels // 4 else position % side
        frequency = 10_000 ** (-2 * (pair % (channels // 4)) / (channels / 2))
        angle = torch.tensor(((coordinate + 0.5) / patch - 0.5) * frequency, dtype=torch.float64)
        number = torch.complex(*x[:, position, :, 2 * pair : 2 * pair + 2].double().unbind(-1))
        found[:, position, :, pair] = number * torch.exp(1j * angle)
    return torch.view_as_real(found).flatten(-2)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_rotation_of_packed_tokens_is_that_of_the_grid_at_the_kept_positions(data):
    side, heads, channels = (
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([4, 8, 12])),
    )
    batch, patch = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2]))
    mask = drawn_mask(data, batch, side**2)
    torch.manual_seed(data.draw(st.integers(0, 9)))
    x = torch.randn(batch, side**2, heads, channels)
    rotary = Rotary(side, heads * channels, heads, patch)
    packing = make_packing(mask)
    expected = turned(x, side, patch)[mask]
    torch.testing.assert_close(rotate(x[mask], rotary(packing)).double(), expected, rtol=0, atol=1e-5)
    static = make_static_packing(mask, batch * side**2)
    padded = torch.cat([x[mask], x.new_zeros(len(static.index) - len(packing.index), heads, channels)])
    torch.testing.assert_close(rotate(padded, rotary(static))[: len(expected)].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_of_packed_tokens_is_dense_attention_at_the_kept_positions(qk_norm):
    """Each sample by itself, so nothing leaks; queries and keys turn after their norm, values do not."""
    torch.manual_seed(0)
    side, width, heads = 4, 32, 2
    attention, rotary = Attention(width, heads, "sdpa", qk_norm), Rotary(side, width, heads)
    perturb(attention)
    mask = torch.rand(3, side**2) > 0.5
    x, packing = torch.randn(3, side**2, width), make_packing(mask)
    with torch.no_grad():
        q, k, v = attention.project(x[mask], rotary(packing))
        found = packed_attention(q, k, v, packing, "sdpa").split(list(packing.lengths))
        q, k, v = attention.qkv(x).double().unflatten(2, (3, heads, -1)).unbind(2)
        if qk_norm:
            q, k = (
                each * (each.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
                for norm, each in zip(attention.norms, (q, k), strict=True)
            )
        q, k = turned(q, side), turned(k, side)
        for sample, kept in enumerate(mask):
            scores = torch.einsum("qhd,khd->hqk", q[sample, kept], k[sample, kept]) / (width // heads) ** 0.5
            expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[sample, kept])
            torch.testing.assert_close(found[sample].double(), expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(0, 7)] * 6), st.sampled_from([1, 2, 4]))
def test_scores_depend_on_offsets_alone(places, patch):
    (row, column, other_row, other_column, down, right), side = places, 16
    table = Rotary(side, 32, 2, patch).table
    q, k = torch.randn(2, 1, 2, 16, generator=torch.Generator().manual_seed(0))

    def score(*moved):
        at = [(row + moved[0]) * side + column + moved[1], (other_row + moved[0]) * side + other_column + moved[1]]
        return (rotate(q, table[at[:1]]) * rotate(k, table[at[1:]])).sum(-1)

    torch.testing.assert_close(score(0, 0), score(down, right), rtol=0, atol=1e-4)
    if (row, column) != (other_row, other_column):
        assert not torch.allclose(score(0, 0), (q * k).sum(-1), rtol=0, atol=1e-5)


def test_the_scale_of_a_teachers_positions_is_kept():
    """The four fine positions of a patch turn on average as its teacher's one does."""
    fine, coarse = (torch.view_as_complex(Rotary(side, 32, 2, patch).table) for side, patch in ((8, 2), (4, 1)))
    corners = fine.view(4, 2, 4, 2, 8).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (4, 4, corner, pair)
    torch.testing.assert_close(corners.prod(dim=2), coarse.view(4, 4, 8) ** 4)


def test_rotation_is_in_float32_and_both_of_its_forms_agree(monkeypatch):
    rotation = Rotary(32, 64, 1)(full_packing(1, 1024, torch.device("cpu")))
    x = torch.randn(1024, 1, 64).bfloat16()
    eager = rotate(x, rotation)
    assert eager.dtype == torch.float32
    assert torch.equal(eager[:1], x[:1].float())  # position 0 does not turn
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, rotation), eager, rtol=0, atol=1e-6)


def test_modules_are_those_of_other_libraries():
    torch.manual_seed(0)
    x = torch.randn(5, 48) * torch.logspace(-3, 2, 5)[:, None]
    theirs = diffusers.models.normalization.RMSNorm(48, eps=1e-6, elementwise_affine=False)
    torch.testing.assert_close(rms_norm(x), theirs(x))
    ours = SwiGLU(48, 4.0)
    perturb(ours)
    theirs = timm.layers.SwiGLUPacked(48, hidden_features=ours.fc1.out_features)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_swiglu_has_about_as_many_parameters():
    with torch.device("meta"):
        for width, hidden in ((384, 1024), (768, 2048), (1024, 2728), (1152, 3072)):
            plain, gated = (MLPS[name](width, 4.0) for name in ("gelu", "swiglu"))
            assert gated.fc2.in_features == hidden
            sizes = [sum(p.numel() for p in mlp.parameters()) for mlp in (plain, gated)]
            assert sizes[1] == pytest.approx(sizes[0], rel=2e-3)
        assert MLPS["swiglu"](8, 0.1).fc2.in_features == 8


@pytest.mark.parametrize("name", NETWORKS)
def test_all_choices_build_without_memory_and_the_published_ones_keep_their_names(name):
    names = next(names for names in NAME_MAPS if names.network == name)
    for norm, mlp, position, qk_norm in product(NORMS, MLPS, ("table", "rope"), (False, True)):
        options = {"norm": norm, "mlp": mlp, "position": position, "qk_norm": qk_norm}
        with without_memory():
            built = build_network({**NETWORKS[name], **options})
        assert built.spec.items() >= options.items()
        known = [names.theirs(parameter) is not None for parameter in built.state_dict()]
        assert all(known) == (not qk_norm)  # a rotary table is no parameter


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", [*({key: value} for key, value in MODERN.items()), MODERN], ids=str)
def test_every_parameter_gets_a_gradient_and_samples_do_not_mix(name, options):
    net = network(name, **options)
    x, t, y = inputs()
    output = net.train()(x, t, y)
    loss = output.prediction.square().mean() + (0 if output.routing is None else output.routing.prob.mean())
    loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    with torch.no_grad():
        for row in range(len(x)):
            alone = net(x[row : row + 1], t[row : row + 1], y[row : row + 1]).prediction[0]
            torch.testing.assert_close(alone, output.prediction[row], rtol=1e-4, atol=1e-4)
        without = network(name)
        without.load_state_dict(net.state_dict(), strict=False) if "mlp" not in options else None
        assert not torch.allclose(without(x, t, y).prediction, output.prediction, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("name", "positions"), [("dcdit", 64), ("dit", 16)])
def test_tokens_are_float32_and_know_their_place_by_rotation_alone(name, positions):
    net, arguments = network(name, position="rope"), []
    block = next(module for module in net.modules() if isinstance(module, DiTBlock))
    block.register_forward_pre_hook(lambda _, given: arguments.extend(given))
    with record_hidden_states(net) as states, torch.autocast("cpu", torch.bfloat16):
        output = net(*inputs())
    assert {tokens.dtype for tokens in states.tokens.values()} == {torch.float32}
    mask = torch.ones(3, positions, dtype=torch.bool) if output.routing is None else output.routing.mask
    assert mask.float().mean() > 0.1
    number = torch.zeros(3, positions, 1, 16)
    number[..., 0::2] = 1.0  # which rotation makes a cosine and a sine
    expected = turned(number, int(positions**0.5))[mask].squeeze(1).unflatten(-1, (-1, 2))
    torch.testing.assert_close(arguments[3].double(), expected, rtol=0, atol=1e-6)
    assert net.pos_embed is None


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_rms_stands_wherever_layer_norm_stood(name, monkeypatch):
    nets = [network(name, norm=norm) for norm in NORMS]
    called = []
    plain = torch.nn.functional.layer_norm
    monkeypatch.setattr(
        torch.nn.functional, "layer_norm", lambda *given, **named: called.append(0) or plain(*given, **named)
    )
    counts = []
    for net in nets:
        called.clear()
        net(*inputs())
        counts.append(len(called))
    assert counts == [2 * SIZES["depth"] + 1, 0]  # twice in each block, and in the output


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
def test_feature_caching_sees_what_the_attention_is_given(norm):
    torch.manual_seed(0)
    block, seen = DiTBlock(32, 2, 4.0, "released", "sdpa", BlockStyle(norm)), []
    block.attention.qkv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    grid, c = torch.randn(2, 9, 32) + 1, torch.randn(2, 32)
    block(grid.flatten(0, 1), c, full_packing(2, 9, grid.device))
    torch.testing.assert_close(block.modulated(grid, c).flatten(0, 1), seen[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "norm='batch' is not one of layer, rms"),
        ({"mlp": "swish"}, "mlp='swish' is not one of gelu, swiglu"),
        ({"position": "learned"}, "position='learned'"),
        (
            {"position": "rope", "width": 96, "heads": 16},
            r"heads of 6: take heads=12, or .* multiple of 64, or position='table'",
        ),
        ({"position": "rope", "heads": 5}, "heads=5 does not divide width=64: take heads=4"),
        ({"position": "rope", "width": 64, "heads": 64}, "heads of 1: take heads=16"),
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_cannot_be_built_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        build_network({**NETWORKS[name], **options})


def test_a_width_that_no_table_of_positions_has():
    with pytest.raises(UserError, match="width=62 is not divisible by 4"):
        build_network({**NETWORKS["dit"], "width": 62, "heads": 2})
