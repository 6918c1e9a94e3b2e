"""All points of an evaluation, from lists of values. No torch here, so that mistakes show at once."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from dcdit.checks import shown, to_plain
from dcdit.diffusion.settings import PATH_DROP
from dcdit.errors import UserError
from dcdit.evaluation.settings import EvaluateConfig, EvaluateSettings
from dcdit.sampling.settings import SamplingConfig

_PLURALS = {"drop_fraction": "drop_fractions", "uncond_drop_fraction": "uncond_drop_fractions"}

_LEFT_ALONE = ("cache", *_PLURALS)
"""Keys of which null, in a list, leaves what the configuration says."""

LISTS = ("weights", "sampler.cache", "guidance.weak", "guidance.scale")
"""Keys of sampling that an evaluation takes lists for, beside its own ``drop_fractions``."""


@dataclass(frozen=True)
class EvaluationGrid:
    """The points that an evaluation measures.

    Attributes:
        points: the sampling at each of them; no two sample the same.
        left_out: descriptions of combinations that mean nothing.
        beyond: how many points ``max_images`` leaves out.
    """

    points: list[SamplingConfig]
    left_out: list[str]
    beyond: int


def grid_of(settings: EvaluateConfig) -> EvaluationGrid:
    """Return the points of all combinations of the lists in a configuration.

    Raises:
        UserError: naming key, value and remedy.
    """
    values = to_plain(settings)
    weights, caches, weaks, scales = (_listed(values, key) for key in LISTS)
    single = {"weights": weights[0], "sampler.cache": caches[0], "guidance.weak": None, "guidance.scale": 1.0}
    _check_budget(settings, SamplingConfig.of(_with(values, single)))
    lists: dict[str, list[Any]] = {
        "weights": weights,
        "sampler.cache": caches,
        "guidance.weak": weaks,
        "guidance.uncond_drop_fraction": _or_null(settings.uncond_drop_fractions),
        "guidance.drop_fraction": _or_null(settings.drop_fractions),
        "guidance.scale": scales,
    }
    points: dict[str, SamplingConfig] = {}
    left_out: list[str] = []
    for combination in product(*lists.values()):
        chosen: dict[str, Any] = dict(zip(lists, combination, strict=True))
        if chosen["guidance.weak"] in PATH_DROP:  # whatever the others drop
            chosen["guidance.uncond_drop_fraction"] = 1.0
        unguided = SamplingConfig.of(_with(values, {**chosen, "guidance.scale": 1.0}))
        guidance = unguided.guidance
        if chosen["guidance.scale"] != 1 and guidance.guiding_equals_main:
            left_out.append(
                f"guidance.weak={guidance.weak}, drop fraction {guidance.drop_fraction:g}, of the guiding branch"
                f" {guidance.uncond_drop_fraction or 0:g}: the guiding branch would be no weaker, and guide nowhere"
            )
            continue
        config = SamplingConfig.of(_with(values, chosen))
        if not (config.budget.given and chosen["guidance.scale"] != 1):  # which decides on the guiding branch, too
            config = replace(config, guidance=config.guidance.canonical)
        points.setdefault(repr(config), config)
    if not points:
        remedy = "take drop fractions below 1" if weaks[0] in PATH_DROP else "give guidance.uncond_drop_fraction=0.9"
        raise UserError(f"{left_out[0]}: {remedy}")
    if settings.search and len({config.guidance.scale for config in points.values()}) < 2:
        raise UserError(
            f"search=true looks between two scales at least, and guidance.scale={scales[0]:g} is one: give"
            " guidance.scale=[1,1.5,2]"
        )
    within = _within(list(points.values()), settings)
    return EvaluationGrid(within, list(dict.fromkeys(left_out)), len(points) - len(within))


def _or_null(drops: list[float] | None) -> list[Any]:
    """Return a list of drop fractions, or of null if there are none: the fraction that ``guidance`` has."""
    return drops or [None]


def _within(points: list[SamplingConfig], settings: EvaluateSettings) -> list[SamplingConfig]:
    """Return as many of the points as ``max_images`` allows; a search counts for itself."""
    if settings.max_images is None or settings.search:
        return points
    if settings.max_images < settings.count:
        raise UserError(
            f"max_images={settings.max_images} is less than one measurement takes, count={settings.count}: raise it,"
            " or take a smaller count"
        )
    return points[: settings.max_images // settings.count]


def _check_budget(settings: EvaluateSettings, config: SamplingConfig) -> None:
    """Raise :class:`UserError` where a budget is given twice, or a search has nothing to search."""
    others = config.budget.given or config.guidance.drop_fraction or config.guidance.drop_schedule
    if settings.drop_fractions is not None and others:
        raise UserError(
            f"drop_fractions={settings.drop_fractions}: the budget is given by budget, guidance.drop_fraction or"
            " guidance.drop_schedule too; leave one out"
        )
    if settings.uncond_drop_fractions is not None and config.guidance.uncond_drop_fraction is not None:
        raise UserError(
            f"uncond_drop_fractions={settings.uncond_drop_fractions}: guidance.uncond_drop_fraction is given too; leave"
            " one out"
        )


def _listed(values: Mapping[str, Any], key: str) -> list[Any]:
    """Return the values at a dotted key; a single one may stand without brackets."""
    section, _, name = key.rpartition(".")
    node = values.get(section) if section else values
    if not isinstance(node, Mapping):
        return [None]  # refused by the configuration, which knows the section
    for single, many in _PLURALS.items():
        if section == "guidance" and isinstance(node.get(single), list):
            listed = ",".join(map(str, node[single]))
            raise UserError(f"guidance.{single}=[{listed}] is a list: give several as {many}=[{listed}]")
    value = node.get(name)
    if value == []:
        raise UserError(f"{key}=[] asks for nothing: name at least one value, such as {key}=[{shown(1)}]")
    return list(value) if isinstance(value, list) else [value]


def _with(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with the ``chosen`` ones at their dotted keys; null leaves a cache or a drop fraction alone."""
    changed = deepcopy(dict(values))
    for key, value in chosen.items():
        section, _, name = key.rpartition(".")
        node = changed.get(section) if section else changed
        if isinstance(node, dict) and not (value is None and name in _LEFT_ALONE):
            node[name] = value
    return changed
