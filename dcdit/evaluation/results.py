"""Results of evaluations: what a file of one must hold, and what results share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from dcdit.checks import (
    Count,
    DropFraction,
    Matches,
    Natural,
    NonNegative,
    NotEmpty,
    Number,
    OneOf,
    Seed,
    conform,
    shown,
)
from dcdit.diffusion.settings import CacheThreshold, Steps
from dcdit.errors import UserError
from dcdit.evaluation.settings import METRICS, figures_of_metrics
from dcdit.evaluation.words import differences_from_published
from dcdit.runtime.files import read_json
from dcdit.runtime.limits import TEXT_BYTES

SCHEMA = 5
"""Of the files that :class:`dcdit.evaluation.measure.Measurement` writes."""


def is_png(path: Path) -> bool:
    """Whether a file is a picture of no unusual size, and no link: it goes into the page."""
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n" and path.stat().st_size <= TEXT_BYTES


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
        """Drop fraction of the main branch."""
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
        sampler = {key: value for key, value in self.plan["sampler"].items() if key != "cache"}
        return {**{key: self.plan[key] for key in keys}, "sampler": sampler, "guidance": guidance}

    @property
    def budget(self) -> dict[str, Any]:
        """What results on one curve over the guidance scale share: all but that, and the seed of training."""
        training = {key: value for key, value in self.values["training"].items() if key != "seed"}
        guidance = {key: value for key, value in self.plan["guidance"].items() if key not in _SETTING}
        known = {"training": training, "weights": self.plan["weights"], "step": self.plan["step"]}
        return {**known, "cache": self.plan["sampler"]["cache"], **guidance}

    @property
    def ema_decay(self) -> float | None:
        """Decay of the EMA whose weights were measured; None for other weights, or where nobody says it."""
        ema = self.values["training"].get("ema")
        decay = ema.get("decay") if isinstance(ema, Mapping) and self.plan["weights"] == "ema" else None
        return decay if isinstance(decay, float) else None

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
        return path if is_png(path) else None

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
            "ema_decay": self.ema_decay,
            **{f"sampler_{key}": value for key, value in plan["sampler"].items()},
            **{f"guidance_{key}": value for key, value in plan["guidance"].items() if key != "drop_fraction"},
            "sampling_precision": plan["precision"],
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


_NAMES = "*_cfg*_drop*_*.json"
"""Of files of results, for folders that hold others too."""

_REMEDY = "evaluate again, or remove it"

_Text = Annotated[str, Matches("(?s).{0,4096}", "a text of at most 4,096 characters")]

_KEYS: dict[str, Any] = {
    "run": _Text,
    "checkpoint": _Text,
    "network.title": _Text,
    "network.routes": bool,
    "parameters": Natural,
    "training": dict[str, Any],
    "metrics": dict[str, Number | None],
    "tflops_per_image": NonNegative,
    "milliseconds_per_image": NonNegative,
    "timing.rounds": list[NonNegative],
    "timing.batch_size": Count,
    "reference": _Text,
    "device": _Text,
    "plan.weights": _Text,
    "plan.step": Natural | None,
    "plan.precision": _Text,
    "plan.count": Count,
    "plan.labels": _Text,
    "plan.seed": Seed,
    "plan.metrics": Annotated[list[Annotated[str, OneOf(METRICS)]], NotEmpty("it measures nothing")],
    "plan.features.name": _Text,
    "plan.features.weights": _Text | None,
    "plan.features.resize": _Text,
    "plan.rounding": _Text,
    "plan.reference.count": Natural,
    "plan.reference.published": list[Literal["features", "spatial"]],
    "plan.sampler.name": _Text,
    "plan.sampler.steps": Steps,
    "plan.sampler.cache": CacheThreshold,
    "plan.guidance.scale": Number,
    "plan.guidance.interval": tuple[Natural, Natural] | None,
    "plan.guidance.drop_fraction": DropFraction,
    "plan.guidance.uncond_drop_fraction": DropFraction | None,
    "plan.guidance.drop_schedule": list[Any] | None,
    "plan.guidance.weak": Literal["uncond", "budget"],
    "plan.guidance.weak_checkpoint": _Text | None,
    "plan.guidance.channels": Count,
}
"""What a result must hold; it holds more, which is for people."""

_ROUTED: dict[str, Any] = {
    "keep_ratio.mean": NonNegative,
    "keep_ratio.timesteps": list[Number],
    "keep_ratio.strong": list[NonNegative],
}


def read_results(places: Sequence[str]) -> tuple[list[Result], list[str]]:
    """What :func:`find_results` finds; UserError if there is no result that can be used."""
    results, left_out = find_results(places)
    if not results:
        raise UserError(
            left_out[0]
            if left_out
            else f"runs={', '.join(places)}: no results there, python -m dcdit.evaluate writes them"
        )
    return results, left_out


def find_results(places: Sequence[str]) -> tuple[list[Result], list[str]]:
    """All results in and below ``places``, by path; the newest where a run was measured twice in the same way.

    Returns:
        The results, and what is wrong with the files that are left out.

    Raises:
        UserError: if a place does not exist.
    """
    files: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"runs={place} does not exist")
        if place.is_file():
            files.append(place)
        else:
            own = "*.json" if place.name == "evaluation" else _NAMES  # of a folder that `out` named
            files += [*place.rglob("evaluation/*.json"), *place.glob(own)]
    results: dict[str, Result] = {}
    left_out: list[str] = []
    for file in sorted(set(files), key=lambda path: (path.lstat().st_mtime, path)):
        try:
            result = read_result(file)
        except UserError as error:
            left_out.append(str(error))
            continue
        values = result.values
        results[json.dumps([values["run"], result.setting, result.budget, result.scale], sort_keys=True)] = result
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
        ratios = values.get("keep_ratio")
        if ratios is not None and len(ratios["timesteps"]) != len(ratios["strong"]):
            raise UserError("keep_ratio has not as many ratios as timesteps")
        for figure in figures_of_metrics(values["plan"]["metrics"]):
            conform(f"metrics.{figure.key}", _dig(values, f"metrics.{figure.key}"), Number)
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
