"""Which points an evaluation measures where guiding branches leave the backbone out."""

import pytest
from support.configs import compose_config

from dcdit.errors import UserError
from dcdit.evaluation.grid import grid_of
from dcdit.evaluation.settings import EvaluateConfig
from dcdit.settings.compose import configuration_of


def grid(*words):
    given = ("checkpoint=digits", "reference=x", "guidance.scale=2", *words)
    return grid_of(configuration_of(EvaluateConfig, compose_config(*given, name="evaluate")))


def test_a_branch_without_backbone_is_one_point_whatever_the_others_drop():
    found = grid("guidance.weak=[uncond,path,path_class]", "uncond_drop_fractions=[0.5,0.9]")
    points = [(point.guidance.weak, point.guidance.uncond_drop_fraction) for point in found.points]
    assert points == [("uncond", 0.5), ("uncond", 0.9), ("uncond", 1.0), ("budget", 1.0)]
    beside = grid("guidance.weak=[budget,path]", "guidance.uncond_drop_fraction=0.5")
    assert [point.guidance.uncond_drop_fraction for point in beside.points] == [0.5, 1.0]


def test_a_budget_decides_on_the_guiding_branch_too():
    points = grid("budget.fraction=0.6", "guidance.scale=[1,2]").points
    # None is that of the main branch, once it is known.
    assert [point.guidance.uncond_drop_fraction for point in points] == [None, None]


def test_guidance_that_leads_nowhere_is_left_out_or_refused_with_its_own_remedy():
    found = grid("guidance.weak=path_class", "drop_fractions=[0,1]")
    assert [point.guidance.drop_fraction for point in found.points] == [0.0]
    assert "guidance.weak=path_class, drop fraction 1" in found.left_out[0]
    with pytest.raises(UserError, match="take drop fractions below 1"):
        grid("guidance.weak=path_class", "drop_fractions=[1]")
    with pytest.raises(UserError, match=r"give guidance\.uncond_drop_fraction=0\.9"):
        grid("guidance.weak=budget")
