"""Results of evaluations, read and put in order: which figures may stand in one plot, and which are one curve."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from dcdit.checks import Count, DropFraction, Natural, NonNegative, NotEmpty, OneOf, Seed, conform, shown
from dcdit.errors import UserError
from dcdit.evaluation.settings import METRICS, Figure, figures_of_metrics
from dcdit.runtime.files import LARGEST, read_json

SCHEMA = 4
"""Of the files that :class:`dcdit.evaluation.measure.Measurement` writes."""


def _is_png(path: Path) -> bool:
    """Whether a file is a picture of no unusual size: it goes into the page."""
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n" and path.stat().st_size <= LARGEST


_SEED = re.compile(r"[-_/. ]*(seed)?[-_=. ]*$")


_SETTING = ("scale", "channels", "interval")


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        path: the file it comes from.
        values: its content, see :class:`dcdit.evaluation.measure.Measurement`.
    """

    path: Path
    values: dict[str, Any]

    @property
    def plan(self) -> dict[str, Any]:
        """Everything that the figures stand for."""
        return self.values["plan"]

    @property
    def drop(self) -> float:
        """Drop fraction of the strong half."""
        return float(self.plan["guidance"]["drop_fraction"])

    @property
    def scale(self) -> float:
        """Guidance scale."""
        return float(self.plan["guidance"]["scale"])

    @property
    def setting(self) -> dict[str, Any]:
        """What two results must share to be compared."""
        guidance = {key: self.plan["guidance"][key] for key in ("channels", "interval")} if self.scale != 1 else {}
        keys = ("sampler", "precision", "count", "labels", "rounding", "features", "reference", "metrics", "seed")
        return {**{key: self.plan[key] for key in keys}, "guidance": guidance}

    @property
    def budget(self) -> dict[str, Any]:
        """What results on one curve over the guidance scale share: all but that, and the seed of training."""
        training = {key: value for key, value in self.values["training"].items() if key != "seed"}
        guidance = {key: value for key, value in self.plan["guidance"].items() if key not in _SETTING}
        return {"training": training, "weights": self.plan["weights"], "step": self.plan["step"], **guidance}

    @property
    def kind(self) -> dict[str, Any]:
        """What results on one curve over the budget share: all but the drop fraction and the seed of training."""
        budget = {key: value for key, value in self.budget.items() if key != "drop_fraction"}
        return {**budget, "scale": self.scale}

    def figure(self, key: str) -> float:
        """A figure that was measured."""
        return float(self.values["metrics"][key])

    @property
    def network(self) -> str:
        """The network, for people."""
        return str(self.values["network"]["title"])

    @property
    def preview(self) -> Path | None:
        """Picture of the first images, if it is there."""
        path = self.path.with_suffix(".png")
        return path if path.is_file() and not path.is_symlink() and _is_png(path) else None

    def row(self) -> dict[str, Any]:
        """The measurement as one flat row."""
        plan, values = self.plan, self.values
        return {
            "run": values["run"],
            "network": self.network,
            "drop_fraction": self.drop,
            **values["metrics"],
            "tflops_per_image": values["tflops_per_image"],
            "milliseconds_per_image": values["milliseconds_per_image"],
            "keep_ratio": values["keep_ratio"]["mean"] if "keep_ratio" in values else None,
            "parameters": values["parameters"],
            "step": plan["step"],
            "training_seed": values["training"].get("seed"),
            "weights": plan["weights"],
            **{f"sampler_{key}": value for key, value in plan["sampler"].items()},
            **{f"guidance_{key}": value for key, value in plan["guidance"].items() if key != "drop_fraction"},
            "precision": plan["precision"],
            "count": plan["count"],
            "labels": plan["labels"],
            "rounding": plan["rounding"],
            "seed": plan["seed"],
            "features": plan["features"]["name"],
            "features_weights": plan["features"]["weights"],
            "features_resize": plan["features"]["resize"],
            "reference": values["reference"],
            "reference_count": plan["reference"]["count"],
            "reference_published": " ".join(plan["reference"]["published"]),
            "as_published": not differences_from_published(values),
            "device": values["device"],
            "batch_size": values["timing"]["batch_size"],
            "time_rounds": len(values["timing"]["rounds"]),
        }


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


def rounding_words(plan: dict[str, Any]) -> str:
    """How pixels were brought to 0..255, for people."""
    return {"round": "pixels rounded", "truncate": "pixels truncated"}.get(plan["rounding"], plan["rounding"])


def reference_words(values: dict[str, Any]) -> str:
    """What was compared with, for people."""
    reference, place = values["plan"]["reference"], values["reference"]
    images = f"{reference['count']:,} images of {place}"
    if not reference["published"]:
        return f"against {images}"
    names = {"features": "FID", "spatial": "sFID"}
    of = " and ".join(names[each] for each in reference["published"])
    alone = f"{of} against the statistics of the whole set in {place}"
    return f"{alone}, the rest against {images}" if reference["count"] else alone


def differences_from_published(values: dict[str, Any]) -> list[str]:
    """Why figures are no FID-50K, sFID, IS, precision and recall as the ADM suite defines them; none if they are."""
    plan = values["plan"]
    found = []
    if plan["count"] != PUBLISHED_COUNT:
        found.append(f"{plan['count']:,} images instead of {PUBLISHED_COUNT:,}")
    if plan["labels"] != "random":
        found.append(f"{plan['labels']} labels instead of random ones")
    if plan["features"]["name"] != PUBLISHED_FEATURES:
        found.append(f"features of {plan['features']['name']} instead of {PUBLISHED_FEATURES}")
    if "features" not in plan["reference"]["published"]:
        found.append("FID against images instead of the statistics of a whole training set")
    if "spatial" not in plan["reference"]["published"] and "sfid" in plan["metrics"]:
        found.append("sFID against images instead of the statistics of a whole training set")
    if plan["precision"] != "fp32":
        found.append(f"sampled in {plan['precision']} instead of fp32")
    return found


PUBLISHED_COUNT, PUBLISHED_FEATURES = 50_000, "inception-v3-compat"


def weak_words(guidance: dict[str, Any]) -> str:
    """What the weak half is, for people; empty if none runs."""
    if guidance["scale"] == 1:
        return ""
    words = {"uncond": "no class", "budget": "same class"}[guidance["weak"]]
    if guidance["weak_checkpoint"] is not None:
        words += f" of checkpoint {guidance['weak_checkpoint'][:6]}"
    own = guidance["uncond_drop_fraction"]
    return words if own is None else f"{words}, ρ {own:g}"


def budget_words(plan: dict[str, Any]) -> str:
    """A point without its guidance scale, for people."""
    guidance = plan["guidance"]
    words = "ρ by timestep" if guidance["drop_schedule"] is not None else f"ρ {guidance['drop_fraction']:g}"
    weak = weak_words(guidance)
    return f"{plan['weights']} weights, {words}" + (f", weak half: {weak}" if weak else "")


def point_words(plan: dict[str, Any]) -> str:
    """A point of a grid, for people."""
    return f"{budget_words(plan)}, guidance {plan['guidance']['scale']:g}"


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


def step_words(step: int | None) -> str:
    """Optimiser steps trained, for people."""
    return "at an unknown step" if step is None else f"step {step}"


_REMEDY = "evaluate again, or remove it"

_KEYS: dict[str, Any] = {
    "run": str,
    "checkpoint": str,
    "network.title": str,
    "network.routes": bool,
    "parameters": Natural,
    "training": dict[str, Any],
    "metrics": dict[str, float | None],
    "tflops_per_image": NonNegative,
    "milliseconds_per_image": NonNegative,
    "timing.rounds": list[NonNegative],
    "timing.batch_size": Count,
    "reference": str,
    "device": str,
    "plan.weights": str,
    "plan.step": Natural | None,
    "plan.precision": str,
    "plan.count": Count,
    "plan.labels": str,
    "plan.seed": Seed,
    "plan.metrics": Annotated[list[Annotated[str, OneOf(METRICS)]], NotEmpty("it measures nothing")],
    "plan.features.name": str,
    "plan.features.weights": str | None,
    "plan.features.resize": str,
    "plan.rounding": str,
    "plan.reference.count": Natural,
    "plan.reference.published": list[Literal["features", "spatial"]],
    "plan.sampler.name": str,
    "plan.sampler.steps": Count,
    "plan.guidance.scale": float,
    "plan.guidance.interval": tuple[int, int] | None,
    "plan.guidance.drop_fraction": DropFraction,
    "plan.guidance.uncond_drop_fraction": DropFraction | None,
    "plan.guidance.drop_schedule": list[Any] | None,
    "plan.guidance.weak": Literal["uncond", "budget"],
    "plan.guidance.weak_checkpoint": str | None,
    "plan.guidance.channels": Count | None,
}
"""What a result must hold; it holds more, which is for people."""

_ROUTED: dict[str, Any] = {
    "keep_ratio.mean": NonNegative,
    "keep_ratio.timesteps": list[float],
    "keep_ratio.strong": list[NonNegative],
}


def read_results(places: Sequence[str]) -> tuple[list[Result], list[str]]:
    """All results in and below ``places``, by path; the newest where a run was measured twice in the same way.

    Returns:
        The results, and what is wrong with the files that are left out.

    Raises:
        UserError: if a place does not exist, or there is no result that can be used.
    """
    files: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"runs={place} does not exist")
        if place.is_file():
            files.append(place)
        else:
            files += [*place.rglob("evaluation/*.json"), *(place.glob("*.json") if place.name == "evaluation" else [])]
    results: dict[str, Result] = {}
    left_out: list[str] = []
    for file in sorted(set(files), key=lambda path: (path.lstat().st_mtime, path)):
        try:
            result = read_result(file)
        except UserError as error:
            left_out.append(str(error))
            continue
        values = result.values
        results[json.dumps([values["run"], result.setting, result.kind, result.drop], sort_keys=True)] = result
    if not results:
        raise UserError(
            left_out[0]
            if left_out
            else f"runs={', '.join(places)}: no results there, python -m dcdit.evaluate writes them"
        )
    return sorted(results.values(), key=lambda result: result.path), left_out


def figures_of(home: Path, step: int | None, weights: str) -> list[dict[str, Any]]:
    """What was measured of a checkpoint, one row for each measurement; nothing if nothing was."""
    try:
        results, _ = read_results([str(home)])
    except UserError:
        return []
    keys = (
        *("drop_fraction", "sampler_name", "sampler_steps", "guidance_scale", "guidance_weak"),
        *("guidance_uncond_drop_fraction", "count", "labels", "features", "reference_count"),
    )
    found = []
    for result in results:
        if (result.plan["step"], result.plan["weights"]) == (step, weights):
            row = result.row()
            costs = ("tflops_per_image", "keep_ratio")
            found.append({key: row[key] for key in (*keys, *result.values["metrics"], *costs)})
    return sorted(found, key=lambda row: (row["guidance_scale"], row["drop_fraction"]))


def read_result(file: Path) -> Result:
    """One result; :class:`UserError` if it is none, or of another release."""
    try:
        values = read_json(file, dict[str, Any], _REMEDY)
    except FileNotFoundError:
        raise UserError(f"{file} is a link to nowhere: remove it") from None
    schema = values.get("schema")
    if schema is None:
        raise UserError(f"{file} is no result of dcdit.evaluate: remove it")
    if schema != SCHEMA:
        raise UserError(
            f"{file} was written by another release (schema {shown(schema)}, this one reads {SCHEMA}): evaluate again"
        )
    try:
        keys = {**_KEYS, **(_ROUTED if "keep_ratio" in values else {})}
        for key, hint in keys.items():
            conform(key, _dig(values, key), hint)
        steps = values["plan"]["sampler"]["steps"]
        ratios = values.get("keep_ratio")
        if ratios is not None and {len(ratios[key]) for key in ("timesteps", "strong")} != {steps}:
            raise UserError(f"keep_ratio has not the {steps} steps of the sampler")
        for figure in figures_of_metrics(values["plan"]["metrics"]):
            conform(f"metrics.{figure.key}", _dig(values, f"metrics.{figure.key}"), float)
    except UserError as error:
        raise UserError(f"{file} is a corrupt result of dcdit.evaluate ({error}): {_REMEDY}") from error
    return Result(file, values)


def _dig(values: Any, key: str) -> Any:
    """The value at a dotted key; UserError if there is none."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            raise UserError(f"{key} is missing")
        values = values[name]
    return values


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
