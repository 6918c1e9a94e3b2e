import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import golden_folders

from dcdit.network import dechunk as chunking
from dcdit.network.dechunk import blur, dechunk, kernels, nearest_kept, smooth, straight_through
from dcdit.network.packing import full_packing, make_packing, pack
from dcdit.network.routing import Routing


@st.composite
def masks(draw):
    batch, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    mask = torch.rand(batch, height * width, generator=generator) < draw(st.sampled_from([0.02, 0.2, 0.6, 1.0]))
    mask[:, draw(st.integers(0, height * width - 1))] = True
    return mask.view(batch, height, width)


@settings(max_examples=100, deadline=None)
@given(mask=masks())
def test_nearest_kept_against_brute_force(mask):
    batch, height, width = mask.shape
    nearest = nearest_kept(mask)
    row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
    squared = (row[:, None] - row).square() + (column[:, None] - column).square()
    for b in range(batch):
        kept = mask[b].flatten().nonzero().squeeze(1)
        among_kept = squared[:, kept] * height * width + kept  # ties to the lowest raster index
        assert torch.equal(nearest[b], kept[among_kept.argmin(dim=1)])


@settings(max_examples=50, deadline=None)
@given(mask=masks())
def test_packing_keeps_raster_order(mask):
    mask = mask.flatten(1)
    packing = make_packing(mask)
    grid = torch.randn(*mask.shape, 5)
    tokens = pack(grid, packing)
    assert len(tokens) == sum(packing.lengths) == packing.cu_seqlens[-1]
    for b, part in enumerate(tokens.split(packing.lengths)):
        assert torch.equal(part, grid[b][mask[b]])
    assert torch.equal(packing.sample, torch.repeat_interleave(torch.tensor(packing.lengths)))


def test_full_packing_equals_a_full_mask():
    made, full = make_packing(torch.ones(3, 7, dtype=torch.bool)), full_packing(3, 7, torch.device("cpu"))
    assert made.lengths == full.lengths
    assert made.bound == full.bound
    for name in ("cu_seqlens", "sample", "index"):
        assert torch.equal(getattr(made, name), getattr(full, name))


def naive_smooth(h, q, at, sigma):
    """The formula of the paper for one sample: h (M, D), q (M,), at (M, 2)."""
    q = q.clamp(1e-4, 1 - 1e-4)
    weight = torch.exp(-(at[:, None] - at).square().sum(-1) / (2 * sigma**2)) * q
    mean = weight @ h / (weight.sum(1, keepdim=True) + 1e-8)
    return q[:, None] * h + (1 - q[:, None]) * mean


@settings(max_examples=50, deadline=None)
@given(mask=masks(), sigma=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 1000), together=st.integers(1, 3))
def test_smoothing_against_the_formula(mask, sigma, seed, together):
    torch.manual_seed(seed)
    height, width = mask.shape[1:]
    packing = make_packing(mask.flatten(1))
    h = torch.randn(sum(packing.lengths), 6, dtype=torch.float32, requires_grad=True)
    p = (0.5 + 0.5 * torch.rand(len(h))).requires_grad_()  # kept tokens are the likelier ones
    at = torch.stack([packing.index % packing.bound // width, packing.index % width], dim=1).float()
    expected = torch.cat(
        [naive_smooth(*parts, sigma) for parts in zip(*(x.split(packing.lengths) for x in (h, p, at)), strict=True)]
    )
    with pytest.MonkeyPatch.context() as patch:  # one, two or three samples are smoothed at once
        patch.setitem(chunking._AT_ONCE, "cpu", together * h.shape[1] * packing.bound)
        smoothed = smooth(h, p, packing, (height, width), sigma)
    torch.testing.assert_close(smoothed, expected, rtol=1e-5, atol=2e-6)
    upstream = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad(smoothed, (h, p), upstream), torch.autograd.grad(expected, (h, p), upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


def test_blur_of_a_point_is_the_kernel():
    field = torch.zeros(1, 5, 7, 1)
    field[0, 2, 3, 0] = 2.0
    row, column = torch.meshgrid(torch.arange(5) - 2, torch.arange(7) - 3, indexing="ij")
    expected = 2 * torch.exp(-(row.square() + column.square()) / (2 * 1.5**2))
    torch.testing.assert_close(blur(field, kernels((5, 7), 1.5, field.device))[0, ..., 0], expected)


@given(s=st.floats(0.5, 1.0, width=32))
def test_straight_through_is_exactly_one_with_unit_gradient(s):
    confidence = torch.tensor(s, requires_grad=True)
    value = straight_through(confidence)
    assert value.item() == 1.0
    assert torch.autograd.grad(value, confidence)[0].item() == 1.0


@pytest.mark.skipif("dev" not in golden_folders(), reason="DCDIT_GOLDEN does not point at the reference's numbers")
class TestGolden:
    def test_nearest(self):
        folder = golden_folders()["dev"]
        with np.load(folder / "funcs.npz") as stored:
            for name in [*json.loads((folder / "funcs_names.json").read_text()), "64x64"]:
                if "x" not in name:
                    continue
                height, width = map(int, name.split("x"))
                mask, index = (torch.from_numpy(stored[f"nearest/{name}/{kind}"]) for kind in ("mask", "idx"))
                nearest = nearest_kept(mask.view(-1, height, width))
                rank = mask.long().cumsum(1) - 1  # index into the raster-ordered list of kept positions
                assert torch.equal(rank.gather(1, nearest), index.long())

    @pytest.mark.parametrize("case", ["S8_D16", "S16_D24", "S32_D8"])
    @pytest.mark.parametrize("sigma", [1, 2])
    def test_dechunk(self, case, sigma):
        prefix = f"dechunk/{case}_sigma{sigma}/"
        with np.load(golden_folders()["dev"] / "funcs.npz") as stored:
            data = {k.removeprefix(prefix): torch.from_numpy(stored[k]) for k in stored.files if k.startswith(prefix)}
        side = int(case[1:].split("_")[0])
        prob, mask, valid = data["prob"].requires_grad_(), data["mask"], data["chunk_mask"]
        padded = data["h"].requires_grad_()
        tokens = padded[valid]  # raster order within each sample, as ours
        routing = Routing(prob, mask, mask)
        out = dechunk(tokens, routing, make_packing(mask), (side, side), float(sigma))
        step = 7 if side == 32 else 1
        torch.testing.assert_close(out[:, ::step], data["out"], rtol=1e-5, atol=5e-6)
        upstream = data["grad_out_full"] if side == 32 else data["grad_out"]
        grad_h, grad_prob = torch.autograd.grad(out, (padded, prob), upstream)
        torch.testing.assert_close(grad_h[valid], data["grad_h"][valid], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(grad_prob, data["grad_prob"], rtol=1e-4, atol=1e-4)
