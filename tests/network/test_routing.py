import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import golden_folders

from dcdit.errors import UserError
from dcdit.network import DCDiT
from dcdit.network.routing import CosineRouter, route, tail_drop

probabilities = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.rand(3, 30, generator=torch.Generator().manual_seed(seed)).mul(20).round().div(20)  # with ties
)


def decide(prob, drop):
    return route(prob, drop)


@settings(max_examples=50, deadline=None)
@given(prob=probabilities, low=st.floats(0, 0.99), high=st.floats(0, 0.99))
def test_masks_nest_and_keep_the_most_certain(prob, low, high):
    low, high = sorted((low, high))
    wide, narrow = decide(prob, low), decide(prob, high)
    assert torch.equal(decide(prob, 0.0).mask, wide.natural_mask)
    assert not (narrow.mask & ~wide.mask).any()
    assert not (wide.mask & ~wide.natural_mask).any()
    for p, natural, mask in zip(wide.prob, wide.natural_mask, wide.mask, strict=True):
        kept = int(natural.sum())
        expected = max(1, kept - math.floor(np.float32(kept) * np.float32(low)))
        assert int(mask.sum()) == expected
        dropped = natural & ~mask
        if dropped.any():
            assert p[mask].min() >= p[dropped].max()
            tied = p == p[dropped].max()
            # among equals the lower raster index stays
            if (tied & mask).any():
                assert (tied & mask).nonzero().max() < (tied & dropped).nonzero().min()


def test_ends_are_kept_and_exactly_half_is_not():
    routing = decide(torch.tensor([[0.0, 0.5, 0.5000001, 0.2, 0.0]]), 0.0)
    assert routing.mask.tolist() == [[True, False, True, False, True]]
    assert routing.prob[0, [0, -1]].tolist() == [1.0, 1.0]
    assert (routing.confidence >= 0.5).all()


def test_the_product_is_a_float32_one():
    prob = torch.linspace(0.6, 0.9, 20)[None]
    mask = torch.ones(1, 20, dtype=torch.bool)
    assert tail_drop(prob, mask, 0.9).sum() == 2
    assert tail_drop(prob, mask, torch.tensor([0.9])).sum() == 2


@pytest.mark.parametrize("drop", [-0.1, 1.1, 1.5, float("nan")])
def test_fraction_out_of_range(drop):
    with pytest.raises(UserError, match="drop_fraction"):
        decide(torch.rand(1, 4), drop)


def test_unknown_router():
    with pytest.raises(UserError, match="cosin"):
        DCDiT(grid=8, channels=4, num_classes=5, width=64, depth=1, heads=2, groups=8, router="cosin")


def test_cosine_router_against_the_formula():
    torch.manual_seed(0)
    router = CosineRouter(6)
    for projection in (router.query, router.key):
        torch.nn.init.normal_(projection.weight)
    features = torch.randn(2, 6, 3, 4)
    prob = router(features).view(2, 3, 4)
    q = router.query(features.permute(0, 2, 3, 1))
    k = router.key(features.permute(0, 2, 3, 1))
    for row in range(3):
        for column in range(4):
            around = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
            similarities = [
                torch.cosine_similarity(q[:, row, column], k[:, r, c], dim=-1)
                for r, c in around
                if 0 <= r < 3 and 0 <= c < 4
            ]
            expected = torch.stack([(1 - s) / 2 for s in similarities]).mean(0)
            torch.testing.assert_close(prob[:, row, column], expected)


@pytest.mark.skipif("dev" not in golden_folders(), reason="DCDIT_GOLDEN does not point at the reference's numbers")
@pytest.mark.parametrize("size", [8, 16])
def test_golden_masks(size):
    with np.load(golden_folders()["dev"] / "funcs.npz") as stored:
        data = {k: torch.from_numpy(stored[k]) for k in stored.files if k.startswith(f"routing/S{size}/")}
    data = {k.rsplit("/", 1)[1]: v for k, v in data.items()}
    for number, fraction in enumerate(data["fractions"].tolist()):
        routing = decide(data["prob_in"], fraction)
        assert torch.equal(routing.natural_mask, data["natural"])
        torch.testing.assert_close(routing.confidence, data["selected_probs"], rtol=0, atol=0)
        several = data["mask_scalar"][number].sum(1) > 1  # between the two forced ones the reference's choice varies
        assert torch.equal(routing.mask[several], data["mask_scalar"][number][several])
    assert torch.equal(decide(data["prob_in"], data["fractions_tensor"]).mask, data["mask_tensor"])


@pytest.mark.skipif("dev" not in golden_folders(), reason="DCDIT_GOLDEN does not point at the reference's numbers")
def test_golden_drop_counts():
    with np.load(golden_folders()["dev"] / "funcs.npz") as stored:
        fractions, table = stored["ndrop/fractions"], stored["ndrop/table"]
    for fraction, row in zip(fractions, table, strict=True):
        for kept in (1, 2, 7, 10, 20, 100, 333, 1000, 4096):
            if row[kept] < kept:
                mask = torch.zeros(1, 4097, dtype=torch.bool)
                mask[:, :kept] = True
                assert kept - int(tail_drop(torch.rand(1, 4097), mask, float(fraction)).sum()) == row[kept]


@pytest.mark.parametrize(
    ("router", "words"),
    [
        (lambda x: x.mean(1), "float32 of shape [2, 8, 8], not float32 probabilities (B, L) = [2, 64]"),
        (lambda x: (x.mean(1).flatten(1).sigmoid(),), "returned a tuple, not a tensor"),
        (lambda x: x.mean(1).flatten(1).sigmoid().half(), "returned torch.float16"),
        (lambda x: x.mean(1).flatten(1) * 0 - 0.5, "values from -0.5 to -0.5, which are no probabilities"),
        (lambda x: x.mean(1).flatten(1) * 0 + 1.5, "does it lack a sigmoid?"),
        (lambda x: (x.mean(1).flatten(1) * 0).index_fill(1, torch.tensor([5]), math.nan), "NaN for finite features"),
    ],
)
def test_a_router_that_returns_no_probabilities_is_one_message(router, words):
    class Wrong(torch.nn.Module):
        def forward(self, features):
            return router(features)

    net = DCDiT(8, 1, 3, width=32, depth=1, heads=2, encoder_width=16, groups=8)
    net.router = Wrong()
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        net(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert str(caught.value).startswith("the router Wrong returned ")


def test_a_router_is_not_blamed_for_features_that_are_not_finite():
    net = DCDiT(8, 1, 3, width=32, depth=1, heads=2, encoder_width=16, groups=8)
    x = torch.full((2, 1, 8, 8), math.nan)
    assert net(x, torch.zeros(2), torch.zeros(2, dtype=torch.int64)).routing.prob.isnan().any()
