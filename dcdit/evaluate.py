"""Quality against compute: ``python -m dcdit.evaluate checkpoint=... reference=... drop_fractions=[0,0.2]``.

Draws images at every budget and compares them with a reference by FID, KID and Inception Score. What is measured is
kept as one file for each point; finished points are not measured again, and a killed evaluation goes on where it was.
Any number of processes shares the work.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dcdit.checks import check_drop_fraction
from dcdit.errors import UserError
from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.images import open_images
from dcdit.evaluation.measure import Point
from dcdit.evaluation.metrics import HEADINGS, KEYS, check_metrics
from dcdit.evaluation.reference import Reference, default_cache
from dcdit.runtime.processes import processes
from dcdit.runtime.progress import Display
from dcdit.sampling.setup import Drawing, check_guidance, own_values, prepare
from dcdit.settings.entry import CONFIG_DIR, entry_point
from dcdit.settings.schema import call_checked


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        reference: a folder of images, a directory of latent shards, or an ``.npz`` with images.
        metrics: some of ``fid``, ``kid``, ``is``.
        drop_fractions: budgets to measure; None takes the one that ``guidance`` or ``budget`` says.
        count: images at each budget.
        part: images of a part; what a kill loses at most, on each process.
        out: folder for the results; None takes ``evaluation`` beside the checkpoint's folder.
        shown: images of the strip that is kept of each point.
        reference_count: take so many images of the reference, evenly spaced; None takes all.
        time_rounds: rounds in which all budgets take turns to draw a batch against the clock, at the end; 0 leaves the
            times at what they were while measuring.
        time_again: do that again for points that have been timed.
        cache: folder for the statistics of references; None takes one in the user's cache.
    """

    reference: str
    metrics: list[str]
    drop_fractions: list[float] | None = None
    count: int = 50_000
    part: int = 500
    out: str | None = None
    shown: int = 10
    reference_count: int | None = None
    time_rounds: int = 3
    time_again: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("count", "part", "shown"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is not a positive number")
        if self.time_rounds < 0:
            raise UserError(f"time_rounds={self.time_rounds} is negative")
        if self.drop_fractions == []:
            raise UserError("drop_fractions=[] asks for nothing: name at least one, such as 0")
        for fraction in self.drop_fractions or []:
            check_drop_fraction(fraction, "drop_fractions")


def build_features(spec: Any, device: torch.device) -> FeatureNetwork:
    """The feature network that the user's configuration names; UserError if it cannot be had."""
    try:
        network = hydra.utils.instantiate(spec)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is not set: give {error.full_key}=...") from None
    except hydra.errors.InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        words = " ".join(line.strip() for line in str(error).splitlines() if not line.startswith("full_key"))
        raise UserError(f"features: {words}" + (f" ({root})" if root is not error else "")) from error
    if not isinstance(network, FeatureNetwork):
        raise UserError(
            f"features: {type(network).__name__} is no FeatureNetwork: give your module as features=own"
            " features.module._target_=..."
        )
    return network.to(device)


def budgets(drawing: Drawing, fractions: list[float] | None) -> list[Drawing]:
    """One drawing for each drop fraction; UserError if the network drops nothing."""
    if fractions is None:
        return [drawing]
    found = [
        replace(drawing, guidance=replace(drawing.guidance, drop_fraction=each)) for each in dict.fromkeys(fractions)
    ]
    for each in found:
        check_guidance(each.model, each.guidance)
    return found


def points_of(config: DictConfig) -> tuple[list[Point], Request]:
    """Everything that an evaluation needs, loaded and checked; UserError naming key, value and remedy."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    values.pop("features")
    request = call_checked(Request, own_values(values), "")
    others = {**values["budget"], **{key: values["guidance"].get(key) for key in ("drop_fraction", "drop_schedule")}}
    if request.drop_fractions is not None and any(others.values()):
        raise UserError(
            f"drop_fractions={request.drop_fractions}: the budget is given by budget, guidance.drop_fraction or"
            " guidance.drop_schedule too; leave one out"
        )
    drawing = prepare(values)
    drawings, device = budgets(drawing, request.drop_fractions), drawing.model.device
    network = build_features(config.features, device)
    height, width = drawing.decode(torch.zeros(1, *drawing.model.latents["shape"], device=device)).shape[2:]
    images = open_images(request.reference, (height, width), device, drawing.common.autoencoder)
    cache = Path(request.cache) if request.cache else default_cache()
    part = max(request.part, 500)  # reading is quick
    reference = Reference(images, network, cache, request.reference_count, part, drawing.common.batch_size)
    check_metrics(request.metrics, network, request.count, reference.count)
    run_dir = Path(drawing.common.checkpoint).resolve().parent.parent
    out = Path(request.out) if request.out else run_dir / "evaluation"
    points = [
        Point(each, reference, network, request.metrics, request.count, request.part, request.shown, out)
        for each in drawings
    ]
    return points, request


def measure(points: list[Point], rank: int, world_size: int) -> list[Point]:
    """Do this process's share and write the results that are complete; returns these points."""
    with Display(rank, "reading the reference", "part") as display:
        points[0].reference.work(rank, world_size, display)
    for point in points:
        with Display(rank, point.title, "part") as display:
            point.work(rank, world_size, display)
        point.conclude()
    # Whoever comes last finds what the others have left.
    return [point for point in points if point.conclude()]


def take_times(points: list[Point], rounds: int, again: bool) -> None:
    """Time all budgets in turns, unless that has been done: under equal conditions, whatever else the machine does."""
    with points[0].lock():  # the first of several processes does it
        if not again and all(point.timed for point in points):
            return
        seconds: dict[Point, list[float]] = {point: [] for point in points}
        for _ in track(range(rounds), "timing", console=Console(stderr=True), transient=True):
            for point in points:
                seconds[point].append(point.time_batch())
        for point in points:
            point.set_time(seconds[point])


def table(points: list[Point]) -> Table:
    """Figures, and what they stand for."""
    found = [json.loads(point.path.read_text()) for point in points]
    plan = found[0]["plan"]
    sampler, guidance = plan["sampler"], plan["guidance"]
    title = (
        f"{found[0]['run']}, step {plan['step']}, {plan['weights']} weights, {plan['precision']}:"
        f" {plan['count']} images, {sampler['name']} {sampler['steps']} steps, guidance {guidance['scale']:g}."
        f" Features of {plan['features']['name']}, against {plan['reference']['count']} of {found[0]['reference']}."
        f" Time on {found[0]['device']}, batches of {found[0]['timing']['batch_size']}"
    )
    shown = Table(title=title, title_justify="left")
    for heading in ("drop", *(HEADINGS[name] for name in plan["metrics"]), "kept", "TFLOPs", "ms/image"):
        shown.add_column(heading, justify="right")
    for result in found:
        metrics, figures = result["metrics"], [f"{result['plan']['guidance']['drop_fraction']:g}"]
        for name in plan["metrics"]:
            key = KEYS[name]
            deviation = metrics.get(f"{key}_std")
            figures.append(f"{metrics[key]:.4g}" + (f" ± {deviation:.2g}" if deviation is not None else ""))
        figures.append(f"{result['kept']['share']:.1%}" if "kept" in result else "-")
        shown.add_row(*figures, f"{result['tflops_per_image']:.3g}", f"{result['milliseconds_per_image']:.3g}")
    return shown


def run(config: DictConfig) -> list[Path]:
    """Measure what ``config`` asks for; returns the files of the finished points."""
    points, request = points_of(config)
    out, (rank, world_size) = points[0].out, processes()
    try:
        finished = measure(points, rank, world_size)
        if len(finished) == len(points) and request.time_rounds:
            take_times(points, request.time_rounds, request.time_again and rank == 0)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}. Finished parts are kept; the same command goes on"
            " from there"
        ) from error
    except KeyboardInterrupt:
        print("Finished points and parts are kept; the same command goes on from there.", file=sys.stderr)
        raise
    if finished and (rank == 0 or any(point.concluded for point in finished)):
        Console().print(table(finished))
        print(f"Results: {os.path.relpath(out)}")
    if len(finished) < len(points):
        print(f"Process {rank} is done; what is left is measured by other processes, or by the same command again.")
    return [point.path for point in finished]


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="evaluate")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    run(config)


if __name__ == "__main__":
    entry_point(main)
