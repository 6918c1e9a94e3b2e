"""Statistics of latents, and the scale and shift that follow from them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdit.data.latents import LatentSpec, LatentStatistics
from dcdit.data.statistics import Sums, Tally
from dcdit.errors import UserError

SHAPE = (3, 2, 4)


def sums(arrays: np.ndarray, representation: str = "sample", by_element: bool = False) -> Sums:
    tally = Tally(SHAPE, representation, by_element)
    for array in arrays:
        tally.add(array)
    return tally.sums


def spec(scale, shift) -> LatentSpec:
    return LatentSpec(SHAPE, "identity", scale, shift, ("a",))


def latents(count: int, seed: int = 0) -> np.ndarray:
    """Each element with a mean and deviation of its own."""
    rng = np.random.default_rng(seed)
    return rng.normal(3 * rng.standard_normal(SHAPE), rng.uniform(0.2, 5, SHAPE), (count, *SHAPE)).astype(np.float32)


@given(st.integers(2, 12), st.lists(st.integers(0, 12), max_size=3), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_they_are_those_of_all_latents_however_these_are_divided(count, cuts, by_element, seed):
    values = latents(count, seed)
    parts = np.split(values, sorted(min(cut, count) for cut in cuts))
    found = Sums.total([sums(part, by_element=by_element) for part in parts])
    statistics = found.statistics(3)
    np.testing.assert_allclose(statistics.mean, values.mean(axis=(0, 2, 3), dtype=np.float64), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(statistics.deviation, values.std(axis=(0, 2, 3), dtype=np.float64), rtol=1e-9)


@pytest.mark.parametrize("by_element", [False, True])
@pytest.mark.parametrize("moments", [False, True])
def test_what_the_network_sees_has_mean_0_and_deviation_1(by_element, moments):
    values = latents(4000)
    stored = values
    if moments:  # a posterior of variance 4 at each place
        stored = np.concatenate([values, np.full_like(values, np.log(4.0))], axis=1)
        values = values + 2 * np.random.default_rng(1).standard_normal(values.shape).astype(np.float32)
    found = sums(stored, "moments" if moments else "sample", by_element)
    own = spec(*found.normalisation(SHAPE))
    seen = own.normalised(torch.from_numpy(values))
    over = (0,) if by_element else (0, 2, 3)
    torch.testing.assert_close(seen.mean(over), torch.zeros(SHAPE if by_element else 3), atol=0.06, rtol=0)
    torch.testing.assert_close(seen.std(over), torch.ones(SHAPE if by_element else 3), atol=0.06, rtol=0)
    torch.testing.assert_close(own.restored(seen), torch.from_numpy(values), rtol=1e-4, atol=1e-4)
    in_whole = own.normalised_statistics(found.statistics(3))
    assert in_whole is None if by_element else in_whole.is_normal


def test_a_constant_channel_keeps_scale_1_and_what_is_not_finite_counts_for_nothing():
    values = latents(50)
    values[:, 1] = 0.7
    values[7, 0, 0, 0] = np.nan
    found = sums(values)
    scale, shift = found.normalisation(SHAPE)
    assert scale[1] == 1.0
    assert shift[1] == pytest.approx(0.7)
    assert spec(scale, shift).normalised_statistics(found.statistics(3)).is_normal
    others = np.delete(values, 7, axis=0)
    np.testing.assert_allclose(shift, others.mean(axis=(0, 2, 3), dtype=np.float64))
    with pytest.raises(UserError, match="not one latent is finite"):
        Sums.total([sums(values[7:8])])


@pytest.mark.parametrize(
    ("scale", "words"),
    [((1.0, 2.0), "scale has 2 numbers"), (((1.0,),), "scale=1: a list is needed"), ((), "asks for nothing"),
     ((((1.0,) * 4, (1.0,) * 3),) * 3, "scale has 3 x 2 x 4 numbers"), ((1.0, -1.0, 1.0), "scale=-1 is not positive"),
     ([1.0, "x", 1.0], "scale='x' is not a number")],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(scale, words):
    with pytest.raises(UserError, match=words):
        spec(scale, 0.0)


def test_latents_far_from_normal_are_told_by_channel():
    assert LatentStatistics((0.0, 0.4), (0.8, 1.2)).describe_unusual() == ""
    assert "deviation 7 in channel 1 where" in LatentStatistics((0.0, 0.0), (1.0, 7.0)).describe_unusual()
    assert "deviation 0.1 in channel 0 and 1 other where" in LatentStatistics((0.0, 0.0), (0.1, 7.0)).describe_unusual()
    assert "mean -4 in channel 0 where" in LatentStatistics((-4.0, 0.0), (1.0, 1.0)).describe_unusual()


def test_specs_survive_a_checkpoint_and_differences_are_told():
    one, other = (spec(*sums(latents(9, seed), by_element=True).normalisation(SHAPE)) for seed in (0, 1))
    assert LatentSpec.from_plain(one.to_plain(), "latents") == one
    assert one.difference(one) is None
    assert "scale is" in one.difference(other)
    reordered = spec(one.scale[::-1], one.shift)
    assert one.difference(reordered).startswith("scale differs, though both have numbers of")
