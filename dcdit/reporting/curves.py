"""Measurements put in order: which may stand in one plot, which are one curve, and which are the best."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dcdit.evaluation.descriptions import (
    describe_budget,
    describe_clipping,
    describe_guiding_branch,
    describe_reference,
    describe_rounding,
    describe_step,
)
from dcdit.evaluation.results import Result
from dcdit.evaluation.settings import Figure, figures_of_metrics
from dcdit.reporting.collect import budget_key, comparison_key, without_keys


@dataclass(frozen=True)
class Axis:
    """A quantity that a curve runs over.

    Attributes:
        key: a field of :class:`dcdit.diffusion.settings.GuidanceSettings`.
        symbol: in tables and plots.
    """

    key: str
    symbol: str

    def position(self, result: Result) -> float:
        """Return where a result stands on the axis."""
        value = getattr(result.plan.guidance, self.key)
        return float(result.drop if value is None else value)


DROP, GUIDING_DROP = Axis("drop_fraction", "ρ"), Axis("uncond_drop_fraction", "ρ guiding")
SCALE = Axis("scale", "guidance")


@dataclass(frozen=True)
class CurvePoint:
    """Results at one position of an axis, one for each training seed."""

    at: float
    results: tuple[Result, ...]

    def values(self, of: Callable[[Result], float]) -> list[float]:
        """Return a number ``of`` each result."""
        return [of(result) for result in self.results]

    def figures(self, figure: Figure) -> list[float]:
        """Return a figure of each result."""
        return [result.figure(figure.key) for result in self.results]


@dataclass(frozen=True)
class Series:
    """One curve: a checkpoint, or those of several training seeds, over an axis.

    Attributes:
        name: of the runs, without their seeds, and what else tells it from other curves.
        label: the same as short as it may be where all curves are of these runs.
        network: the network's name.
        points: by their position on the axis.
    """

    name: str
    label: str
    network: str
    points: tuple[CurvePoint, ...]

    @property
    def first(self) -> Result:
        """A result that stands for all of the curve where they agree."""
        return self.points[0].results[0]


@dataclass(frozen=True)
class Section:
    """Curves that may stand in one plot: same sampler, number of images, features and reference.

    Attributes:
        axis: what the series run over: the drop fraction of the main branch or, where that is always the same, of the
            guiding branch.
        series: one for each guidance.
        scales: over the guidance scale, one for each budget; none where there is but one scale.
    """

    axis: Axis
    series: tuple[Series, ...]
    scales: tuple[Series, ...] = ()

    @property
    def results(self) -> list[Result]:
        """All results of the section."""
        return [result for series in self.series for point in series.points for result in point.results]

    @property
    def figures(self) -> list[Figure]:
        """The figures that were measured."""
        return figures_of_metrics(self.series[0].first.plan.metrics)

    def describe(self) -> str:
        """Describe the shared setting."""
        first = self.series[0].first
        plan, sampler, interval = first.plan, first.plan.sampler, first.plan.guidance.interval
        scales = sorted({result.scale for result in self.results})
        guidance = f"guidance {scales[0]:g}" if scales[0] != 1 else "no guidance"
        if len(scales) > 1:
            guidance = f"guidance {scales[0]:g} to {scales[-1]:g}"
        if scales[-1] != 1 and interval:
            guidance += f" at timesteps {interval[0]} to {interval[1]}"
        return (
            f"{plan.count:,} images, {plan.labels} labels, {describe_rounding(plan)},"
            f" {sampler.name} with {sampler.steps} steps{describe_clipping(sampler)}, {guidance}, {plan.precision},"
            f" seed {plan.seed}; features of {plan.features.name} (weights {plan.features.weights},"
            f" resize: {plan.features.resize}), {describe_reference(first)}"
        )


def pareto(results: Sequence[Result], figure: Figure) -> list[Result]:
    """Return the results that no other one beats in both the figure and the TFLOPs, from cheap to dear."""
    sign = -1 if figure.higher_is_better else 1
    ordered = sorted(results, key=lambda result: (result.tflops_per_image, sign * result.figure(figure.key)))
    front: list[Result] = []
    for result in ordered:
        if not front or sign * result.figure(figure.key) < sign * front[-1].figure(figure.key):
            front.append(result)
    return front


def best_of(results: Sequence[Result], figure: Figure) -> Result:
    """Return the result with the best figure."""
    return figure.best(results, key=lambda result: result.figure(figure.key))


def describe_best(results: Sequence[Result]) -> list[str]:
    """Describe the best guidance scale at each budget of which several were measured."""
    descriptions = []
    for group in by_budget(results):
        figure = figures_of_metrics(group[0].plan.metrics)[0]
        best = best_of(group, figure)
        budget = describe_budget(next(result.plan for result in group if result.scale != 1))
        descriptions.append(f"{figure.heading} {best.figure(figure.key):.4g} at guidance {best.scale:g} ({budget})")
    return descriptions


def by_budget(results: Sequence[Result]) -> list[list[Result]]:
    """Group results that differ in the guidance scale alone; scale 1 stands for any guiding branch."""
    unguided = [result for result in results if result.scale == 1]
    groups = []
    for group in _together([result for result in results if result.scale != 1], budget_key):
        without = {**budget_key(group[0]), **_NO_GUIDING_BRANCH}
        group += [result for result in unguided if {**budget_key(result), **_NO_GUIDING_BRANCH} == without]
        if len({result.scale for result in group}) > 1:
            groups.append(group)
    return groups


_NO_GUIDING_BRANCH = {"weak": None, "weak_checkpoint": None, "uncond_drop_fraction": None, "every": 1}


def _together(results: Iterable[Result], key: Callable[[Result], dict[str, Any]]) -> list[list[Result]]:
    """Group results whose ``key`` is equal, in the order of their first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(key(result), sort_keys=True), []).append(result)
    return list(groups.values())


def arrange(results: Sequence[Result]) -> list[Section]:
    """Arrange results in sections of curves; names of curves are unique within each section."""
    sections = []
    for group in _sections(results):
        drops = {GUIDING_DROP.position(result) for result in group if result.scale != 1}
        axis = GUIDING_DROP if len({result.drop for result in group}) == 1 and len(drops) > 1 else DROP
        sections.append(Section(axis, _series(_over(axis, group), axis), _series(by_budget(group), SCALE)))
    return sections


def _over(axis: Axis, results: Sequence[Result]) -> list[list[Result]]:
    """Group results that are one curve over an axis: they differ in nothing else but the seed of training."""

    def rest(result: Result) -> dict[str, Any]:
        return without_keys({**budget_key(result), "scale": result.scale}, axis.key)

    return _together(results, rest)


def _sections(results: Sequence[Result]) -> list[list[Result]]:
    """Group results that may stand in one plot.

    Channels and interval of guidance mean nothing where there is none: such results stand beside guided ones of the
    same setting.
    """
    groups = _together(results, comparison_key)
    guided = [group for group in groups if group[0].scale != 1]
    for group in [group for group in groups if group[0].scale == 1]:
        setting = {**comparison_key(group[0]), "guidance": None}
        same = [other for other in guided if {**comparison_key(other[0]), "guidance": None} == setting]
        if same:
            for other in same:
                other += group
        else:
            guided.append(group)
    order = {id(result): number for number, result in enumerate(results)}
    # The most images first: fewer are a search's way there.
    return sorted(guided, key=lambda group: (-group[0].plan.count, min(order[id(result)] for result in group)))


def _name(runs: Sequence[str]) -> str:
    """Return a common name of runs: what their names begin with, without the seeds."""
    if len(runs) == 1:
        return runs[0]
    return _common_start(runs).rstrip("-_=. ").removesuffix("seed").rstrip("-_/. ") or runs[0]


def _common_start(names: Sequence[str]) -> str:
    """Return the characters with which all names begin."""
    alike = [len(set(characters)) == 1 for characters in zip(*names, strict=False)]
    return names[0][: (*alike, False).index(False)]


def _series(groups: Sequence[list[Result]], axis: Axis) -> tuple[Series, ...]:
    """Return a curve of each group over ``axis``; named by runs, and by what differs between groups."""
    curves = []
    for group in groups:
        example = next((result for result in group if result.scale != 1), group[0])
        curves.append((_name(sorted({result.run for result in group})), example, _aspects(example, axis), group))
    runs = list(dict.fromkeys(run for run, *_ in curves))
    series: list[Series] = []
    for run, _, aspects, group in sorted(curves, key=lambda curve: (runs.index(curve[0]), *_order(curve[1]))):
        same = [others for name, _, others, _ in curves if name == run]
        telling = [text for key, text in aspects.items() if text and len({others[key] for others in same}) > 1]
        name = base = ", ".join([run, *telling])
        number = 1
        while name in {other.name for other in series}:
            number += 1
            name = f"{base} ({number})"
        label = ", ".join(telling) if len(runs) == 1 and telling and name == base else name
        positions = sorted({axis.position(result) for result in group})
        points = tuple(CurvePoint(at, tuple(r for r in group if axis.position(r) == at)) for at in positions)
        series.append(Series(name, label, group[0].network.title, points))
    return tuple(series)


def _order(result: Result) -> tuple[Any, ...]:
    """Return where a curve stands among those of the same runs."""
    plan, guidance = result.plan, result.plan.guidance
    return (
        plan.step or 0,
        plan.weights,
        plan.sampler.cache,
        result.scale != 1,
        guidance.weak != "uncond",
        guidance.weak_checkpoint or "",
        GUIDING_DROP.position(result),
        result.scale,
        result.drop,
    )


def _aspects(result: Result, axis: Axis) -> dict[str, str]:
    """Describe what may tell a curve from others of the same run; not its position on the axis."""
    plan = result.plan
    branch = describe_guiding_branch(plan.guidance, with_drop=axis is not GUIDING_DROP)
    return {
        "step": describe_step(plan.step),
        "weights": f"{plan.weights} weights",
        "drop": "" if axis is DROP else f"ρ {result.drop:g}",
        "cache": f"cache {plan.sampler.cache:g}",
        "scale": "" if axis is SCALE else f"guidance {result.scale:g}" if result.scale != 1 else "no guidance",
        "branch": f"guiding branch: {branch}" if branch else "",
    }
