"""What sampled images cost, added up in any parts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.generate import SampleBatch

POSITIONS, STEPS = 64, 4


@st.composite
def batches(draw: st.DrawFn) -> list[SampleBatch]:
    """Batches of one sampling: a branch runs, and has a router, at the same steps of each."""
    runs = draw(st.lists(st.sampled_from(["main", "both", "guiding has no router"]), min_size=STEPS, max_size=STEPS))
    made, first = [], 0
    for size in draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)):

        def tokens(size=size):
            return torch.tensor(draw(st.lists(st.integers(0, POSITIONS), min_size=size, max_size=size)))

        lengths = [(tokens(), *({"main": (), "both": (tokens(),)}.get(run, (None,)))) for run in runs]
        flops = torch.tensor(draw(st.lists(st.integers(0, 10**12), min_size=size, max_size=size))).double()
        latents = torch.zeros(size, 1, 8, 8)
        made.append(SampleBatch(list(range(first, first + size)), latents, lengths, flops.expand(STEPS, size)))
        first += size
    return made


@settings(max_examples=30, deadline=None)
@given(batches())
def test_the_cost_of_all_is_that_of_the_parts(made):
    cost = SamplingCost.total(map(SamplingCost.of, made))
    assert cost.images == sum(len(batch.indices) for batch in made)
    assert cost.tflops_per_image == torch.cat([batch.flops for batch in made]).mean().item() / 1e12
    routed = [
        torch.stack([lengths for step in batch.lengths for lengths in step if lengths is not None]) for batch in made
    ]
    kept = torch.cat(routed, dim=1).double()  # (evaluations, images)
    assert abs(cost.mean_keep_ratio(POSITIONS) - float(kept.mean()) / POSITIONS) < 1e-12
    assert abs(cost.computed_share - float((kept > 0).double().mean())) < 1e-12
    main, guiding = cost.keep_ratios(POSITIONS)
    assert len(main) == len(guiding) == STEPS
    for step, ratio in enumerate(guiding):
        expected = [batch.lengths[step][1] for batch in made if len(batch.lengths[step]) > 1]
        assert (ratio is None) == (not expected or expected[0] is None)
        if ratio is not None:
            assert abs(ratio - float(torch.cat(expected).double().mean()) / POSITIONS) < 1e-12


def test_networks_without_router_keep_no_tokens():
    batch = SampleBatch([0], torch.zeros(1, 1, 8, 8), [(None, None)], torch.ones(1, 1).double())
    cost = SamplingCost.of(batch)
    assert (cost.mean_keep_ratio(POSITIONS), cost.computed_share) == (None, 1.0)
    assert (cost.main, cost.guiding) == ([None], [None])
