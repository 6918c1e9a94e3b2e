import pytest
import torch
from support.configs import perturb

from dcdit import DCDiT, DiT
from dcdit.errors import UserError
from dcdit.network.blocks import Attention, ConvBlock

SMALL = {
    "grid": 8,
    "channels": 4,
    "num_classes": 5,
    "width": 64,
    "depth": 2,
    "heads": 4,
    "encoder_width": 32,
    "groups": 8,
}
SMALL_DIT = {"grid": 8, "channels": 4, "num_classes": 5, "width": 64, "depth": 2, "heads": 4}


def inputs(batch: int = 3, grid: int = 8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, grid, grid, generator=generator)
    return x, torch.randint(1000, (batch,), generator=generator), torch.randint(5, (batch,), generator=generator)


def lively(**changes) -> DCDiT:
    """A small network that keeps about half of its tokens."""
    net = DCDiT(**{**SMALL, **changes})
    perturb(net)
    if hasattr(net.router, "scorer"):
        torch.nn.init.zeros_(net.router.scorer[3].bias)
    return net.eval()


@pytest.mark.parametrize(
    ("width", "heads", "depth", "count", "positions"),
    [
        (384, 6, 12, 34_367_241, 393_216),
        (768, 12, 12, 136_343_049, 786_432),
        (1024, 16, 24, 468_563_977, 1_048_576),
        (1152, 16, 28, 688_409_865, 1_179_648),
    ],
    ids=["S", "B", "L", "XL"],
)
def test_published_parameter_counts(width, heads, depth, count, positions):
    with torch.device("meta"):
        net = DCDiT(grid=32, channels=4, num_classes=1000, width=width, heads=heads, depth=depth)
    assert sum(p.numel() for p in net.parameters()) == count
    assert net.pos_embed.numel() == positions


@pytest.mark.parametrize("variant", [{}, {"router": "cosine"}, {"smoothing_sigma": None}, {"init": "paper"}])
def test_every_parameter_gets_a_gradient(variant):
    net = lively(**variant).train()
    output = net(*inputs())
    assert 0.05 < output.routing.mask.float().mean() < 1
    (output.prediction.square().mean() + output.routing.prob.mean()).backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@pytest.mark.parametrize("patch", [2, 4])
def test_dit_shapes_and_gradients(patch):
    net = DiT(**SMALL_DIT, patch=patch)
    perturb(net)
    output = net.train()(*inputs())
    assert output.prediction.shape == (3, 8, 8, 8)
    assert output.routing is None
    output.prediction.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_dit_unpatchify_puts_patches_in_place():
    net = DiT(**SMALL_DIT, patch=2)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    image = torch.stack([rows * 8 + columns + 100 * c for c in range(8)])[None]  # (1, 2C, 8, 8)
    tiles = image.unfold(2, 2, 2).unfold(3, 2, 2)  # (1, 2C, h, w, p, q)
    tokens = tiles.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    assert torch.equal(net.unpatchify(tokens), image)


def test_fresh_networks_predict_zero_and_keep_little():
    for scheme in ("released", "paper"):
        output = DCDiT(**SMALL, init=scheme).eval()(*inputs())
        assert (output.prediction == 0).all()
        assert output.routing.mask.float().mean() < 0.2


def test_initialisation_schemes_differ_where_the_table_says():
    torch.manual_seed(0)
    released, paper = DCDiT(**SMALL, init="released"), DCDiT(**SMALL, init="paper")
    for net, zero in ((released, False), (paper, True)):
        assert (net.residual.weight == 0).all().item() is zero
        assert all((block.modulation.weight == 0).all().item() is zero for block in net.backbone.blocks)
        assert (net.output.linear.weight == 0).all()
        assert (net.output.modulation.weight == 0).all()
        assert net.router.scorer[3].bias.item() == pytest.approx(-1.1)
        assert net.condition.label.table.weight.std().item() == pytest.approx(0.02, rel=0.2)
        bound = (6 / (9 * 4 + 32)) ** 0.5  # Xavier of the flattened embedding kernel
        assert 0.9 * bound < net.embed.weight.abs().max() <= bound


@torch.no_grad()
def test_equal_inputs_give_equal_outputs_and_samples_do_not_mix():
    net = lively()
    x, t, y = inputs(5)
    together = net(x, t, y, 0.3)
    assert torch.equal(together.prediction, net(x, t, y, 0.3).prediction)
    for row in range(5):
        alone = net(x[row : row + 1], t[row : row + 1], y[row : row + 1], 0.3)
        assert torch.equal(alone.routing.mask[0], together.routing.mask[row])
        torch.testing.assert_close(alone.prediction[0], together.prediction[row], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_drop_fractions_per_sample_equal_one_at_a_time():
    net = lively()
    x, t, y = inputs(3)
    fractions = torch.tensor([0.0, 0.5, 0.9])
    together = net(x, t, y, fractions)
    for row, fraction in enumerate(fractions.tolist()):
        alone = net(x, t, y, fraction)
        assert torch.equal(alone.routing.mask[row], together.routing.mask[row])
        torch.testing.assert_close(alone.prediction[row], together.prediction[row], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_labels_are_dropped_on_request_only():
    net = lively(label_dropout=0.5)
    x, t, _ = inputs(1)
    x, t, y = x.expand(64, -1, -1, -1), t.expand(64), torch.full((64,), 2)
    null = net(x[:1], t[:1], torch.tensor([net.null_class])).prediction
    same_as_null = [torch.allclose(p, null[0], atol=1e-4) for p in net(x, t, net.drop_labels(y)).prediction]
    assert 10 < sum(same_as_null) < 54
    assert not any(torch.allclose(p, null[0], atol=1e-4) for p in net.train()(x, t, y).prediction)


@torch.no_grad()
def test_conditioning_passes_the_normalisation():
    block = ConvBlock(32, 32, 16, groups=8)
    x = torch.randn(1, 32, 4, 4).expand(2, -1, -1, -1)
    one, other = block(x, torch.randn(2, 16) * 3)
    assert not torch.allclose(one, other, atol=1e-2)


@torch.no_grad()
def test_bf16_autocast_keeps_the_router_in_float32():
    net = lively()
    x, t, y = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(x, t, y)
    assert output.routing.prob.dtype == torch.float32
    exact = net(x, t, y)
    assert (output.routing.prob - exact.routing.prob).abs().max() < 0.1
    agreement = (output.prediction.float() - exact.prediction).norm() / exact.prediction.norm()
    assert agreement < 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads=5 does not divide width=64"),
        ({"width": 0}, "width=0 is outside"),
        ({"width": 62, "heads": 2, "groups": 2}, "width=62 is not divisible by 4"),
        ({"width": 48}, "width=48 is not a multiple of 32"),
        ({"groups": 32}, "groups=32 does not suit 32 channels"),
        ({"groups": 7}, "groups=7 does not suit 32 channels"),
        ({"init": "papr"}, "init='papr'"),
        ({"router": "cosin"}, "router='cosin'"),
        ({"smoothing_sigma": 0.0}, "smoothing_sigma=0 is outside"),
        ({"label_dropout": 1.0}, "label_dropout=1 is outside"),
        ({"attention": "fast"}, "attention='fast'"),
    ],
)
def test_wrong_sizes(changes, message):
    with pytest.raises(UserError, match=message):
        DCDiT(**{**SMALL, **changes})


def test_wrong_inputs():
    x, t, y = inputs()
    with pytest.raises(UserError, match=r"expected x \(B, 4, 8, 8\)"):
        lively()(x[:, :3], t, y)
    with pytest.raises(UserError, match="got x"):
        lively()(x, t[:2], y)
    for label in (-1, lively().num_classes + 1):
        with pytest.raises(
            UserError, match=rf"label {label} is no class: labels are 0 to \d+, the last is the null class"
        ):
            lively()(x, t, torch.full_like(y, label))
    with pytest.raises(UserError, match="patch=3 does not divide grid=8"):
        DiT(**SMALL_DIT, patch=3)
    with pytest.raises(UserError, match="DiT/2 drops no tokens"):
        DiT(**SMALL_DIT)(x, t, y, 0.5)


@pytest.mark.parametrize(("make", "sizes"), [(DCDiT, SMALL), (DiT, SMALL_DIT)])
def test_qk_norm_makes_the_size_of_queries_and_keys_meaningless(make, sizes):
    x, t, y = inputs()
    for qk_norm in (True, False):
        torch.manual_seed(0)
        net = make(**sizes, qk_norm=qk_norm).eval()
        perturb(net)
        before = net(x, t, y).prediction
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert net(x, t, y).prediction.isfinite().all()
        before.square().mean().backward()
        norms = [name for name, _ in net.named_parameters() if ".norms." in name]
        assert len(norms) == (4 if qk_norm else 0)
        assert all(net.get_parameter(name).grad.abs().sum() > 0 for name in norms)
        with torch.no_grad():
            for block in net.modules():
                if isinstance(block, Attention):
                    block.qkv.weight[:128] *= 3
                    block.qkv.bias[:128] *= 3
        assert torch.allclose(before, net(x, t, y).prediction, atol=1e-3) == qk_norm


@pytest.mark.parametrize("position", ["table", "rope"])
@pytest.mark.parametrize(("kind", "sizes"), [(DCDiT, SMALL), (DiT, SMALL_DIT)])
def test_a_device_context_holds_all_of_a_network(kind, sizes, position):
    with torch.device("meta"):
        network = kind(**sizes, position=position)
    assert {each.device.type for each in (*network.parameters(), *network.buffers())} == {"meta"}
