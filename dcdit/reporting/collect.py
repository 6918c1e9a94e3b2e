"""Results in and below folders, and each as one flat row."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcdit.errors import UserError
from dcdit.evaluation.descriptions import differences_from_published
from dcdit.evaluation.results import Result, read_result
from dcdit.evaluation.scores import Score, read_score
from dcdit.runtime.limits import TEXT_BYTES
from dcdit.runtime.processes import say

_NAMES = "*_cfg*_drop*_*.json"
"""Of files of results, for folders that hold others too."""


def is_png(path: Path) -> bool:
    """Return whether a file is a picture that may go into the page: of no unusual size, and no link."""
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n" and path.stat().st_size <= TEXT_BYTES


def without_keys(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the values of all other keys."""
    return {key: value for key, value in values.items() if key not in keys}


def comparison_key(result: Result) -> dict[str, Any]:
    """Return what two results must share to be compared."""
    plan = result.plan
    settings = without_keys(asdict(plan), "step", "weights", "checkpoint", "autoencoder", "batch_size")
    settings["undecoded"] = plan.undecoded
    guidance = {"channels": plan.guidance.channels, "interval": plan.guidance.interval} if result.scale != 1 else {}
    return {**settings, "sampler": without_keys(plan.sampler.spec, "cache"), "guidance": guidance}


def budget_key(result: Result) -> dict[str, Any]:
    """Return what results on one curve over the guidance scale share: all but the scale, and the seed of training."""
    plan = result.plan
    return {
        "training": without_keys(result.training, "seed"),
        "weights": plan.weights,
        "step": plan.step,
        "cache": plan.sampler.cache,
        **without_keys(asdict(plan.guidance), "scale", "channels", "interval"),
    }


def row_of(result: Result) -> dict[str, Any]:
    """Return a result as one flat row, by columns of the CSV file."""
    plan = result.plan
    guidance = without_keys(asdict(plan.guidance), "drop_fraction")
    return {
        "run": result.run,
        "network": result.network.title,
        "drop_fraction": result.drop,
        **result.metrics,
        "tflops_per_image": result.tflops_per_image,
        "milliseconds_per_image": result.milliseconds_per_image,
        "keep_ratio": result.keep_ratio.mean if result.keep_ratio else None,
        "parameters": result.parameters,
        "step": plan.step,
        "training_seed": result.training.get("seed"),
        "weights": plan.weights,
        "ema_decay": result.ema_decay,
        **{f"sampler_{key}": value for key, value in plan.sampler.spec.items()},
        **{f"guidance_{key}": value for key, value in guidance.items()},
        "sampling_precision": plan.precision,
        "count": plan.count,
        "labels": plan.labels,
        "rounding": plan.rounding,
        "seed": plan.seed,
        "features": plan.features.name,
        "features_weights": plan.features.weights,
        "features_resize": plan.features.resize,
        "reference": result.reference,
        "reference_count": plan.reference.count,
        "reference_published": " ".join(plan.reference.published),
        "as_published": not differences_from_published(plan),
        "device": result.device,
        "batch_size": result.timing.batch_size,
        "time_rounds": len(result.timing.rounds),
    }


def read_results(paths: Sequence[str]) -> tuple[list[Result], list[str]]:
    """Return what :func:`find_results` returns; raise UserError if there is no result that can be used."""
    results, left_out = find_results(paths)
    if not results:
        raise UserError(
            left_out[0]
            if left_out
            else f"runs={', '.join(paths)}: no results there, python -m dcdit.evaluate writes them"
        )
    return results, left_out


def find_results(paths: Sequence[str]) -> tuple[list[Result], list[str]]:
    """Find all results in and below ``paths``; where a run was measured twice in the same way, the newest counts.

    Returns:
        The results by path, and what is wrong with the files that are left out.

    Raises:
        UserError: if a path does not exist.
    """
    files = {file for path in paths for file in result_files(Path(path))}
    results: dict[str, Result] = {}
    left_out: list[str] = []
    for file in sorted(files, key=lambda path: (path.lstat().st_mtime, path)):
        try:
            result = read_result(file)
        except UserError as error:
            left_out.append(str(error))
            continue
        key = [result.run, comparison_key(result), budget_key(result), result.scale]
        results[json.dumps(key, sort_keys=True)] = result
    return sorted(results.values(), key=lambda result: result.path), left_out


def result_files(path: Path) -> list[Path]:
    """Return the files of results in and below ``path``, readable or not; UserError if it does not exist."""
    if not path.exists():
        raise UserError(f"runs={path} does not exist")
    if path.is_file():
        return [path]
    pattern = "*.json" if path.name == "evaluation" else _NAMES  # of a folder that `out` named
    return [*path.rglob("evaluation/*.json"), *path.glob(pattern)]


def find_scores(paths: Sequence[str]) -> tuple[list[Score], list[str]]:
    """Find all scores of images in and below ``paths``, in folders called ``scores``.

    Returns:
        The scores by path, and what is wrong with the files that are left out.
    """
    files = {file for path in map(Path, paths) if path.is_dir() for file in path.rglob("scores/*.json")}
    files |= {file for path in map(Path, paths) if path.name == "scores" for file in path.glob("*.json")}
    scores, left_out = [], []
    for file in sorted(files):
        try:
            scores.append(read_score(file))
        except UserError as error:
            left_out.append(str(error))
    return scores, left_out


def figures_of_checkpoint(home: Path, step: int | None, weights: str) -> list[dict[str, Any]]:
    """Return what was measured of a checkpoint, one row for each result below ``home``; [] if nothing was."""
    results, left_out = find_results([str(home)]) if home.exists() else ([], [])
    for reason in left_out:
        say(f"Left out of the figures: {reason}")
    columns = (
        *("drop_fraction", "sampler_name", "sampler_steps", "guidance_scale", "guidance_weak"),
        *("guidance_uncond_drop_fraction", "count", "labels", "features", "reference_count"),
    )
    rows = []
    for result in sorted(results, key=lambda result: (result.scale, result.drop)):
        if (result.plan.step, result.plan.weights) == (step, weights):
            row = row_of(result)
            rows.append({key: row[key] for key in (*columns, *result.metrics, "tflops_per_image", "keep_ratio")})
    return rows
