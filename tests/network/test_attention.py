import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdit.errors import UserError
from dcdit.network import DiT
from dcdit.network.attention import check_installed, packed_attention, resolve_backend
from dcdit.network.packing import Packing, make_packing


def packing_of(lengths: list[int], device: str = "cpu") -> Packing:
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    return make_packing(mask)


def reference(q, k, v, lengths):
    """Softmax attention written out, one sample at a time."""
    outputs = []
    for q1, k1, v1 in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("ihd,jhd->hij", q1, k1) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v1))
    return torch.cat(outputs)


# short lists take the padded form, long ones the form of one call per sample, equal ones the dense form
lengths_lists = st.one_of(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.lists(st.integers(2, 90), min_size=1, max_size=3).map(lambda lengths: [*lengths, 91]),
    st.tuples(st.integers(1, 60), st.integers(1, 4)).map(lambda pair: [pair[0]] * pair[1]),
)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_lists, seed=st.integers(0, 1000))
def test_equals_attention_per_sample(lengths, seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(sum(lengths), 3, 8, requires_grad=True) for _ in range(3))
    out, expected = packed_attention(q, k, v, packing_of(lengths)), reference(q, k, v, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(out)
    for got, wanted in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (out, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 5, 2], [60, 50, 70], [4, 4, 4]])
def test_nothing_leaks_between_samples(lengths):
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 4) for _ in range(3))
    packing = packing_of(lengths)
    before = packed_attention(q, k, v, packing)
    own = slice(lengths[0], lengths[0] + lengths[1])
    for x in (q, k, v):
        x[own] = 1e4
    after = packed_attention(q, k, v, packing)
    others = torch.ones(len(q), dtype=torch.bool)
    others[own] = False
    assert torch.equal(before[others], after[others])


def test_a_backend_that_cannot_run_says_so():
    with pytest.raises(UserError, match=r"attention='varlen' needs a CUDA device.*attention=auto"):
        resolve_backend("varlen", torch.randn(2, 1, 4))
    with pytest.raises(UserError, match="sdp"):
        DiT(grid=4, channels=1, num_classes=2, width=8, depth=1, heads=1, attention="sdp")
    assert resolve_backend("auto", torch.randn(2, 1, 4)) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("width", [64, 72])  # of a head: that of S, B and L, and that of XL
@pytest.mark.parametrize("backend", ["varlen", "flash_attn"])
def test_fast_backends_against_sdpa(backend, width):
    try:
        check_installed(backend)
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    lengths = [3, 200, 77]
    shape, packing = (sum(lengths), 4, width), packing_of(lengths, "cuda")
    halves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    floats = [each.detach().float().requires_grad_() for each in halves]
    fast, oracle = packed_attention(*halves, packing, backend), packed_attention(*floats, packing, "sdpa")
    torch.testing.assert_close(fast.float(), oracle, rtol=2e-2, atol=2e-2)
    upstream = torch.randn_like(oracle)
    found = torch.autograd.grad(fast, halves, upstream.bfloat16())
    for got, wanted in zip(found, torch.autograd.grad(oracle, floats, upstream), strict=True):
        assert (got.float() - wanted).norm() <= 2e-2 * wanted.norm()


def test_scale_is_the_inverse_root_of_the_head_width():
    q, k, v = (torch.randn(5, 2, 16) for _ in range(3))
    dense = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
    torch.testing.assert_close(packed_attention(q, k, v, packing_of([5])), dense)
