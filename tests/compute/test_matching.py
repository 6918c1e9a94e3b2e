"""Training lengths of the paper's table 4."""

import pytest
import torch
from omegaconf import OmegaConf
from support.configs import compose_config

from dcdit.compute.matching import matched_steps, steps_matching
from dcdit.errors import UserError
from dcdit.network import build_network

PUBLISHED = {"s": 421_230, "b": 408_071, "l": 486_372, "xl": 494_943}
FRACTIONS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def build(model: str):
    with torch.device("meta"):
        return build_network(OmegaConf.to_container(compose_config(f"model={model}").model, resolve=True))


# TFLOPs per image of tables 1 and 2: the plain transformer, and DC-DiT at two drop fractions
PAPER = {
    "s": (3.02, (0.2, 3.06), (0.5, 2.14)),
    "b": (11.46, (0.2, 11.94), (0.5, 8.55)),
    "l": (40.21, (0.1, 39.61), (0.3, 31.86)),
    "xl": (59.00, (0.0, 62.99), (0.4, 40.26)),
}


@pytest.mark.parametrize("scale", PAPER)
def test_the_papers_lengths_from_its_flops(scale):
    baseline, (low, dear), (high, cheap) = PAPER[scale]

    def at(drop: float) -> float:  # almost linear in the kept tokens
        return dear + (cheap - dear) / (high - low) * (drop - low)

    steps = matched_steps(400_000, baseline, 50_000, at(0.0), [at(drop) for drop in FRACTIONS])
    assert steps == pytest.approx(PUBLISHED[scale], rel=0.01)


@pytest.mark.parametrize("scale", PUBLISHED)
def test_lengths_from_our_own_count(scale):
    """At 25% of the positions kept; the paper's FLOPs fit 23.8 to 24.7%, so its lengths are a little different."""
    networks = build(f"dcdit_{scale}"), build(f"dit_{scale}_2")
    steps = steps_matching(*networks, 400_000, 4.0, FRACTIONS, 50_000)
    assert steps == pytest.approx(PUBLISHED[scale], rel=0.045)


def test_equal_costs_are_equal_steps_and_the_compute_adds_up():
    assert matched_steps(1000, 7.0, 0, 7.0, []) == 1000
    assert matched_steps(1000, 7.0, 100, 7.0, [7.0]) == 1000
    steps = matched_steps(1000, 10.0, 100, 8.0, [8.0, 4.0])
    assert 100 * 8.0 + (steps - 100) * 6.0 == pytest.approx(1000 * 10.0, abs=6.0)
    with pytest.raises(UserError, match=r"multi_budget.full_budget_steps=2000 .* take fewer than 1250"):
        matched_steps(1000, 10.0, 2000, 8.0, [8.0, 4.0])
