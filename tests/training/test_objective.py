import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import PLAIN_DIT

from dcdit.checks import Compression, conform
from dcdit.errors import UserError
from dcdit.training.objective import balanced_timesteps, drop_fraction_at, ratio_loss, target_compression


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 40), group=st.one_of(st.none(), st.integers(1, 20)), compression=st.floats(1.1, 32))
def test_equal_samples_give_the_analytic_value_for_any_batch_and_group(batch, group, compression):
    prob = torch.full((batch, 20), 0.3)
    mask = (torch.arange(20) < 5).expand(batch, 20)
    r, p, n = 0.25, 0.3, compression
    expected = n / (n - 1) * ((n - 1) * r * p + (1 - r) * (1 - p))
    assert ratio_loss(prob, mask, n, group).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("compression", [2.0, 4.0, 16.0])
def test_one_at_the_target(compression):
    prob = torch.full((4, 16), 1 / compression)
    mask = (torch.arange(16) < 16 / compression).expand(4, 16)
    assert ratio_loss(prob, mask, compression).item() == pytest.approx(1.0)


def test_groups_weigh_by_their_size():
    torch.manual_seed(0)
    prob, mask = torch.rand(20, 9), torch.rand(20, 9) > 0.5
    parts = [ratio_loss(prob[i : i + 16], mask[i : i + 16], 4.0, None) for i in (0, 16)]
    torch.testing.assert_close(ratio_loss(prob, mask, 4.0, 16), (16 * parts[0] + 4 * parts[1]) / 20)


def test_only_the_probability_carries_a_gradient_towards_the_target():
    prob = torch.full((4, 16), 0.6, requires_grad=True)
    gradient = torch.autograd.grad(ratio_loss(prob, prob > 0.5, 4.0), prob)[0]
    assert (gradient > 0).all()  # too many kept: descent lowers the probability


@pytest.mark.parametrize("compression", [1.0, 0.5, -4.0, float("nan")])
def test_compression_must_exceed_one(compression):
    with pytest.raises(UserError, match="compression"):
        conform("compression", compression, Compression)


def test_curriculum():
    assert [target_compression(s, 4.0, 2.0, 10) for s in (0, 5, 10, 99)] == [2.0, 3.0, 4.0, 4.0]
    assert target_compression(0, 4.0, None, 10) == 4.0


def test_drop_fraction_is_a_pure_function_with_warmup():
    fractions = [0.0, 0.2, 0.4]
    drawn = [drop_fraction_at(step, 7, fractions, 100) for step in range(3100)]
    assert set(drawn[:100]) == {0.0}
    assert drawn == [drop_fraction_at(step, 7, fractions, 100) for step in range(3100)]
    assert drawn[100:] != [drop_fraction_at(step, 8, fractions, 100) for step in range(100, 3100)]
    for fraction in fractions:
        assert drawn[100:].count(fraction) == pytest.approx(1000, abs=120)
    assert drop_fraction_at(500, 0, [], 0) == 0.0


@pytest.mark.parametrize(("late", "words", "told"), [(2, (), True), (1, (), False), (2, PLAIN_DIT, False)])
def test_budgets_that_no_step_trains_are_told(tiny, caplog, late, words, told):
    tiny("run", *words, "trainer.max_steps=2", f"multi_budget.full_budget_steps={late}")
    assert ("none of the 2 steps drops tokens or the backbone" in caplog.text) == told


def draw(count, generator):
    return torch.randint(1000, (count,), generator=generator)


@settings(max_examples=50, deadline=None)
@given(world=st.integers(2, 9), batch=st.integers(1, 20), seed=st.integers(0, 2**60))
def test_dealt_timesteps_are_those_of_an_independent_draw(world, batch, seed):
    hands = [balanced_timesteps(draw, seed, world, rank, batch) for rank in range(world)]
    drawn = torch.randint(1000, (world * batch,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.cat(hands).sort().values, drawn.sort().values)
    assert all(len(hand) == batch for hand in hands)


def test_every_rank_sees_all_timesteps_alike_and_hands_are_even():
    world, batch, steps = 4, 8, 1000
    hands = torch.stack(
        [
            torch.stack([balanced_timesteps(draw, seed, world, rank, batch) for rank in range(world)])
            for seed in range(2000)
        ]
    ).float()
    # uniform for each rank and each place in its batch; 2,000 draws have a standard error of 6.5
    assert (hands.mean(dim=0) - (steps - 1) / 2).abs().max() < 5 * 6.5
    assert (hands.std(dim=0) - steps / 12**0.5).abs().max() < 25
    # sums of independent draws would have a standard deviation of 816
    spread = hands.sum(dim=2).std(dim=1).mean()
    assert spread < 816 / 4
