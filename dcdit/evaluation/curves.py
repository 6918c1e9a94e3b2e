"""Measurements put in order: which may stand in one plot, which are one curve, and which are the best."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dcdit.evaluation.results import Result
from dcdit.evaluation.settings import Figure, figures_of_metrics
from dcdit.evaluation.words import budget_words, reference_words, rounding_words, step_words, weak_words

_SEED = re.compile(r"[-_/. ]*(seed)?[-_=. ]*$")


@dataclass(frozen=True)
class CurvePoint:
    """Results at one drop fraction or guidance scale, one for each training seed."""

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
    """One curve: a checkpoint, or those of several training seeds, over drop fractions or guidance scales.

    Attributes:
        name: of the runs, without their seeds, and what else tells it from other curves.
        network: for people.
        points: by drop fraction, or by guidance scale.
    """

    name: str
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
        series: over the drop fraction, one for each guidance.
        scales: over the guidance scale, one for each budget; none where there is but one scale.
    """

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
            f" {sampler['name']} with {sampler['steps']} steps, {guided}, {plan['precision']},"
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


def best_words(results: Sequence[Result]) -> list[str]:
    """The best guidance scale at each budget of which several were measured, in words."""
    found = []
    for group in by_budget(results):
        figure = figures_of_metrics(group[0].plan["metrics"])[0]
        best = (max if figure.higher_is_better else min)(group, key=lambda each: each.figure(figure.key))
        words = budget_words(next(each.plan for each in group if each.scale != 1))
        found.append(f"{figure.heading} {best.figure(figure.key):.4g} at guidance {best.scale:g} ({words})")
    return found


def by_budget(results: Sequence[Result]) -> list[list[Result]]:
    """Results that differ in the guidance scale alone, where there are several; scale 1 stands for any weak half."""
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
    return [
        Section(
            _series(_together(group, "kind"), lambda result: result.drop, drop=False),
            _series(by_budget(group), lambda result: result.scale, drop=True),
        )
        for group in _sections(results)
    ]


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
    return sorted(guided, key=lambda group: min(results.index(result) for result in group))


def _name(runs: Sequence[str]) -> str:
    """What runs are called together: what their names begin with, without the seeds."""
    return runs[0] if len(runs) == 1 else _SEED.sub("", _common_start(runs)) or runs[0]


def _common_start(names: Sequence[str]) -> str:
    """The characters with which all names begin."""
    alike = [len(set(characters)) == 1 for characters in zip(*names, strict=False)]
    return names[0][: (*alike, False).index(False)]


def _series(groups: Sequence[list[Result]], at: Callable[[Result], float], drop: bool) -> tuple[Series, ...]:
    """A curve of each group over ``at``; named by runs, and by what differs between groups, ``drop`` fractions too."""
    found, taken = [], set[str]()
    names = [_name(sorted({str(result.values["run"]) for result in group})) for group in groups]
    aspects = [_aspects(next((each for each in group if each.scale != 1), group[0]), drop) for group in groups]
    for group, name, aspect in zip(groups, names, aspects, strict=True):
        same = [other for other, its in zip(aspects, names, strict=True) if its == name]
        telling = [words for key, words in aspect.items() if words and len({other[key] for other in same}) > 1]
        name = base = ", ".join([name, *telling])
        number = 2
        while name in taken:
            name, number = f"{base} ({number})", number + 1
        taken.add(name)
        positions = sorted({at(result) for result in group})
        points = tuple(CurvePoint(each, tuple(r for r in group if at(r) == each)) for each in positions)
        found.append(Series(name, group[0].network, points))
    return tuple(found)


def _aspects(result: Result, drop: bool) -> dict[str, str]:
    """What may tell a curve from others of the same run, in words."""
    plan = result.plan
    found = {"step": step_words(plan["step"]), "weights": f"{plan['weights']} weights"}
    if drop:
        found["drop"] = f"ρ {result.drop:g}"
    else:
        found["scale"] = f"guidance {result.scale:g}" if result.scale != 1 else "no guidance"
    weak = weak_words(plan["guidance"])
    return {**found, "weak": f"weak half: {weak}" if weak else ""}
