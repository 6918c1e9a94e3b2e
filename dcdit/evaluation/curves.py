"""Measurements put in order: which may stand in one plot, which are one curve, and which are the best."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dcdit.evaluation.results import Result
from dcdit.evaluation.settings import Figure, figures_of_metrics
from dcdit.evaluation.words import budget_words, clip_words, reference_words, rounding_words, step_words, weak_words


@dataclass(frozen=True)
class Axis:
    """What a curve runs over.

    Attributes:
        key: of the guidance in a result's plan.
        symbol: in tables and plots.
    """

    key: str
    symbol: str

    def at(self, result: Result) -> float:
        """Where a result stands."""
        value = result.plan["guidance"][self.key]
        return float(result.drop if value is None else value)


DROP, WEAK_DROP = Axis("drop_fraction", "ρ"), Axis("uncond_drop_fraction", "ρ weak")
SCALE = Axis("scale", "guidance")


@dataclass(frozen=True)
class CurvePoint:
    """Results at one place of an axis, one for each training seed."""

    at: float
    results: tuple[Result, ...]

    def figures(self, *keys: str) -> list[float]:
        """One figure of each result, found by ``keys`` from the outside in."""
        found = []
        for result in self.results:
            value: Any = result.values
            for key in keys:
                value = value[key]
            found.append(float(value))
        return found


@dataclass(frozen=True)
class Series:
    """One curve: a checkpoint, or those of several training seeds, over an axis.

    Attributes:
        name: of the runs, without their seeds, and what else tells it from other curves.
        label: the same as short as it may be where all curves are of these runs.
        network: for people.
        points: by their place on the axis.
    """

    name: str
    label: str
    network: str
    points: tuple[CurvePoint, ...]

    @property
    def first(self) -> Result:
        """A result that stands for all where they agree."""
        return self.points[0].results[0]


@dataclass(frozen=True)
class Section:
    """Curves that may stand in one plot: same sampler, number of images, features and reference.

    Attributes:
        axis: what the series run over: the drop fraction, or that of the guiding branch where the other is constant.
        series: one for each guidance.
        scales: over the guidance scale, one for each budget; none where there is but one scale.
    """

    axis: Axis
    series: tuple[Series, ...]
    scales: tuple[Series, ...] = ()

    @property
    def results(self) -> list[Result]:
        """All of them."""
        return [result for series in self.series for point in series.points for result in point.results]

    @property
    def figures(self) -> list[Figure]:
        """What was measured."""
        return figures_of_metrics(self.series[0].first.plan["metrics"])

    def described(self) -> str:
        """The shared setting in words."""
        values = self.series[0].first.values
        plan = values["plan"]
        sampler, scales = plan["sampler"], sorted({result.scale for result in self.results})
        guided = f"guidance {scales[0]:g}" if scales[0] != 1 else "no guidance"
        if len(scales) > 1:
            guided = f"guidance {scales[0]:g} to {scales[-1]:g}"
        if scales[-1] != 1 and plan["guidance"]["interval"]:
            guided += f" at timesteps {plan['guidance']['interval'][0]} to {plan['guidance']['interval'][1]}"
        return (
            f"{plan['count']:,} images, {plan['labels']} labels, {rounding_words(plan)},"
            f" {sampler['name']} with {sampler['steps']} steps{clip_words(sampler)}, {guided}, {plan['precision']},"
            f" seed {plan['seed']}; features of {plan['features']['name']} (weights {plan['features']['weights']},"
            f" resize: {plan['features']['resize']}), {reference_words(values)}"
        )


def pareto(results: Sequence[Result], figure: Figure) -> list[Result]:
    """Results that no other one beats in both the figure and the TFLOPs, from cheap to dear."""
    sign = -1 if figure.higher_is_better else 1
    ordered = sorted(results, key=lambda each: (each.values["tflops_per_image"], sign * each.figure(figure.key)))
    front: list[Result] = []
    for result in ordered:
        if not front or sign * result.figure(figure.key) < sign * front[-1].figure(figure.key):
            front.append(result)
    return front


def best_of(results: Sequence[Result], figure: Figure) -> Result:
    """The best by a figure."""
    return (max if figure.higher_is_better else min)(results, key=lambda each: each.figure(figure.key))


def best_words(results: Sequence[Result]) -> list[str]:
    """The best guidance scale at each budget of which several were measured, in words."""
    found = []
    for group in by_budget(results):
        figure = figures_of_metrics(group[0].plan["metrics"])[0]
        best = best_of(group, figure)
        words = budget_words(next(each.plan for each in group if each.scale != 1))
        found.append(f"{figure.heading} {best.figure(figure.key):.4g} at guidance {best.scale:g} ({words})")
    return found


def by_budget(results: Sequence[Result]) -> list[list[Result]]:
    """Results that differ in the guidance scale alone, where there are several; scale 1 fits any guiding branch."""
    alone = [result for result in results if result.scale == 1]
    found = []
    for group in _together([result for result in results if result.scale != 1], "budget"):
        without = {**group[0].budget, **_NO_WEAK}
        group += [result for result in alone if {**result.budget, **_NO_WEAK} == without]
        if len({result.scale for result in group}) > 1:
            found.append(group)
    return found


_NO_WEAK = {"weak": None, "weak_checkpoint": None, "uncond_drop_fraction": None}


def _together(results: Iterable[Result], key: str) -> list[list[Result]]:
    """Results whose property ``key`` is equal, in the order of their first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(getattr(result, key), sort_keys=True), []).append(result)
    return list(groups.values())


def arrange(results: Sequence[Result]) -> list[Section]:
    """Sections of curves; names of curves are unique within each."""
    found = []
    for group in _sections(results):
        weak = {WEAK_DROP.at(result) for result in group if result.scale != 1}
        axis = WEAK_DROP if len({result.drop for result in group}) == 1 and len(weak) > 1 else DROP
        found.append(Section(axis, _series(_over(axis, group), axis), _series(by_budget(group), SCALE)))
    return found


def _over(axis: Axis, results: Sequence[Result]) -> list[list[Result]]:
    """Results that are one curve over an axis: they differ in nothing else but the seed of training."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        rest = {key: value for key, value in {**result.budget, "scale": result.scale}.items() if key != axis.key}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(result)
    return list(groups.values())


def _sections(results: Sequence[Result]) -> list[list[Result]]:
    """Results that may stand in one plot. Without guidance its channels and interval say nothing: such results stand
    beside guided ones of the same setting."""
    groups = _together(results, "setting")
    guided = [group for group in groups if group[0].scale != 1]
    for group in [group for group in groups if group[0].scale == 1]:
        setting = {**group[0].setting, "guidance": None}
        same = [other for other in guided if {**other[0].setting, "guidance": None} == setting]
        if same:
            for other in same:
                other += group
        else:
            guided.append(group)
    place = {id(result): number for number, result in enumerate(results)}
    # The most images first: fewer are a search's way there.
    return sorted(guided, key=lambda group: (-group[0].plan["count"], min(place[id(result)] for result in group)))


def _name(runs: Sequence[str]) -> str:
    """What runs are called together: what their names begin with, without the seeds."""
    if len(runs) == 1:
        return runs[0]
    return _common_start(runs).rstrip("-_=. ").removesuffix("seed").rstrip("-_/. ") or runs[0]


def _common_start(names: Sequence[str]) -> str:
    """The characters with which all names begin."""
    alike = [len(set(characters)) == 1 for characters in zip(*names, strict=False)]
    return names[0][: (*alike, False).index(False)]


def _series(groups: Sequence[list[Result]], axis: Axis) -> tuple[Series, ...]:
    """A curve of each group over ``axis``; named by runs, and by what differs between groups."""
    found, taken = [], set[str]()
    runs = {id(group): _name(sorted({str(result.values["run"]) for result in group})) for group in groups}
    order = list(dict.fromkeys(runs.values()))
    example = {id(group): next((each for each in group if each.scale != 1), group[0]) for group in groups}
    groups = sorted(groups, key=lambda group: (order.index(runs[id(group)]), *_order(example[id(group)])))
    aspects = {id(group): _aspects(example[id(group)], axis) for group in groups}
    for group in groups:
        run = runs[id(group)]
        same = [aspects[other] for other, its in runs.items() if its == run]
        telling = [
            words for key, words in aspects[id(group)].items() if words and len({each[key] for each in same}) > 1
        ]
        name = base = ", ".join([run, *telling])
        number = 2
        while name in taken:
            name, number = f"{base} ({number})", number + 1
        taken.add(name)
        label = ", ".join(telling) if len(order) == 1 and telling and name == base else name
        places = sorted({axis.at(result) for result in group})
        points = tuple(CurvePoint(each, tuple(r for r in group if axis.at(r) == each)) for each in places)
        found.append(Series(name, label, group[0].network, points))
    return tuple(found)


def _order(result: Result) -> tuple[Any, ...]:
    """Where a curve stands among those of the same runs."""
    guidance = result.plan["guidance"]
    return (
        result.plan["step"] or 0,
        result.plan["weights"],
        result.plan["sampler"]["cache"],
        result.scale != 1,
        guidance["weak"] != "uncond",
        guidance["weak_checkpoint"] or "",
        WEAK_DROP.at(result),
        result.scale,
        result.drop,
    )


def _aspects(result: Result, axis: Axis) -> dict[str, str]:
    """What may tell a curve from others of the same run, in words; not its place on the axis."""
    plan, guidance = result.plan, dict(result.plan["guidance"])
    if axis is WEAK_DROP:
        guidance["uncond_drop_fraction"] = None
    weak = weak_words(guidance)
    return {
        "step": step_words(plan["step"]),
        "weights": f"{plan['weights']} weights",
        "drop": "" if axis is DROP else f"ρ {result.drop:g}",
        "cache": f"cache {plan['sampler']['cache']:g}",
        "scale": "" if axis is SCALE else f"guidance {result.scale:g}" if result.scale != 1 else "no guidance",
        "weak": f"guiding branch: {weak}" if weak else "",
    }
