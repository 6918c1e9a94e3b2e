"""Results of evaluations, read and put in order: which figures may stand in one plot, and which are one curve."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dcdit.checks import Count, DropFraction, Natural, NonNegative, NotEmpty, OneOf, Seed, conform, shown
from dcdit.errors import UserError
from dcdit.evaluation.settings import METRICS
from dcdit.runtime.files import LARGEST, read_json

SCHEMA = 3
"""Of the files that :class:`dcdit.evaluation.measure.Measurement` writes."""


def _is_png(path: Path) -> bool:
    """Whether a file is a picture of no unusual size: it goes into the page."""
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n" and path.stat().st_size <= LARGEST


_SEED = re.compile(r"[-_/. ]*(seed)?[-_=. ]*$")


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
        """Drop fraction of the conditional half."""
        return float(self.plan["guidance"]["drop_fraction"])

    @property
    def setting(self) -> dict[str, Any]:
        """What two results must share to be compared."""
        guidance = {key: value for key, value in self.plan["guidance"].items() if "drop" not in key}
        keys = ("sampler", "precision", "count", "labels", "features", "reference", "metrics", "seed")
        return {**{key: self.plan[key] for key in keys}, "guidance": guidance}

    @property
    def kind(self) -> dict[str, Any]:
        """What results on one curve share: they may differ in the drop fraction and the seed of training."""
        training = {key: value for key, value in self.values["training"].items() if key != "seed"}
        other = {key: self.plan["guidance"][key] for key in ("uncond_drop_fraction", "drop_schedule")}
        return {"training": training, "weights": self.plan["weights"], "step": self.plan["step"], **other}

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
            "seed": plan["seed"],
            "features": plan["features"]["name"],
            "features_weights": plan["features"]["weights"],
            "reference": values["reference"],
            "reference_count": plan["reference"]["count"],
            "device": values["device"],
            "batch_size": values["timing"]["batch_size"],
            "time_rounds": len(values["timing"]["rounds"]),
        }


@dataclass(frozen=True)
class CurvePoint:
    """Results at one drop fraction, one for each training seed."""

    drop: float
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
    """One curve: a checkpoint, or those of several training seeds, over drop fractions.

    Attributes:
        name: of the runs, without their seeds.
        network: for people.
        points: by drop fraction.
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
    """Curves that may stand in one plot: same sampler, guidance, number of images, features and reference."""

    series: tuple[Series, ...]

    @property
    def metrics(self) -> list[str]:
        """Keys of what was measured."""
        return [METRICS[name].key for name in self.series[0].first.plan["metrics"]]

    def described(self) -> str:
        """The shared setting in words."""
        result = self.series[0].first
        plan, sampler = result.plan, result.plan["sampler"]
        guidance = plan["guidance"]
        guided = f"guidance {guidance['scale']:g}" if guidance["scale"] != 1 else "no guidance"
        if guidance["scale"] != 1 and guidance["interval"]:
            guided += f" at timesteps {guidance['interval'][0]} to {guidance['interval'][1]}"
        return (
            f"{plan['count']:,} images, {plan['labels']} labels,"
            f" {sampler['name']} with {sampler['steps']} steps, {guided}, {plan['precision']},"
            f" seed {plan['seed']}; features of {plan['features']['name']} (weights {plan['features']['weights']})"
            f" against {plan['reference']['count']:,} images of {result.values['reference']}"
        )


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
    "plan.reference.count": Count,
    "plan.sampler.name": str,
    "plan.sampler.steps": Count,
    "plan.guidance.scale": float,
    "plan.guidance.interval": tuple[int, int] | None,
    "plan.guidance.drop_fraction": DropFraction,
    "plan.guidance.uncond_drop_fraction": DropFraction | None,
    "plan.guidance.drop_schedule": list[Any] | None,
}
"""What a result must hold; it holds more, which is for people."""

_ROUTED: dict[str, Any] = {
    "keep_ratio.mean": NonNegative,
    "keep_ratio.timesteps": list[float],
    "keep_ratio.conditional": list[NonNegative],
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
    keys = ("drop_fraction", "sampler_name", "sampler_steps", "guidance_scale", "count", "features", "reference_count")
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
        if ratios is not None and {len(ratios[key]) for key in ("timesteps", "conditional")} != {steps}:
            raise UserError(f"keep_ratio has not the {steps} steps of the sampler")
        for name in values["plan"]["metrics"]:
            _dig(values, f"metrics.{METRICS[name].key}")
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
    return [Section(_series(group)) for group in _together(results, "setting")]


def _common_start(names: Sequence[str]) -> str:
    """The characters with which all names begin."""
    alike = [len(set(characters)) == 1 for characters in zip(*names, strict=False)]
    return names[0][: (*alike, False).index(False)]


def _series(results: Sequence[Result]) -> tuple[Series, ...]:
    found, taken = [], set[str]()
    for group in _together(results, "kind"):
        runs = sorted({str(result.values["run"]) for result in group})
        name = base = runs[0] if len(runs) == 1 else _SEED.sub("", _common_start(runs)) or runs[0]
        lite = group[0].plan["guidance"]["uncond_drop_fraction"]
        if lite is not None:
            name = base = f"{base}, unconditional half {lite:g}"
        if name in taken:
            name = f"{base}, {step_words(group[0].plan['step'])}"
        number = 2
        while name in taken:
            name, number = f"{base} ({number})", number + 1
        taken.add(name)
        drops = sorted({result.drop for result in group})
        points = tuple(CurvePoint(drop, tuple(result for result in group if result.drop == drop)) for drop in drops)
        found.append(Series(name, group[0].network, points))
    return tuple(found)
