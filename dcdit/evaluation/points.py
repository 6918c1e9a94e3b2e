"""All points of an evaluation: what they share, measured by any number of processes, timed in turns, and shown."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.progress import track
from rich.table import Table

from dcdit.errors import UserError
from dcdit.evaluation.curves import best_of, best_words, pareto
from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.images import open_images
from dcdit.evaluation.measure import Deadline, Measurement, OutOfTimeError
from dcdit.evaluation.metrics import COMPUTE, check_counts, choose_metrics
from dcdit.evaluation.reference_images import ReferenceStatistics, default_cache
from dcdit.evaluation.results import Result
from dcdit.evaluation.settings import EvaluateSettings, figures_of_metrics
from dcdit.evaluation.words import (
    clip_words,
    differences_from_published,
    point_words,
    reference_words,
    rounding_words,
    step_words,
    weak_words,
)
from dcdit.runtime.display import Console, Display
from dcdit.sampling.setup import Sampling
from dcdit.settings.instantiate import instantiated

_REFERENCE_CHUNK = 500
"""Images of a task on the reference at least: reading is quick."""


def build_features(spec: Mapping[str, Any], device: torch.device) -> FeatureNetwork:
    """The feature network that the user's configuration names; UserError if it cannot be had."""
    network = instantiated(spec, "features")
    if not isinstance(network, FeatureNetwork):
        raise UserError(
            f"features: {type(network).__name__} is no FeatureNetwork: give your module as features=own"
            " features.module._target_=..."
        )
    return network.to(device)


class Evaluation:
    """What all points of an evaluation share: reference, features, metrics, and where results go.

    Args:
        sampling: of one of the points.
        settings: what to measure.

    Raises:
        UserError: naming key, value and remedy, if something cannot be had.
    """

    def __init__(self, sampling: Sampling, settings: EvaluateSettings) -> None:
        self.settings = settings
        device = sampling.model.device
        size = sampling.decode.size(device)
        asked = sampling.plan
        latents = sampling.model.latents
        images = open_images(settings.reference, size, device, asked.autoencoder, asked.rounding, network=latents)
        self.network = build_features(settings.features, device)  # perhaps a download: after the checks
        there = list(images.moments(self.network))
        self.metrics = choose_metrics(settings.metrics, self.network, bool(images.count), there)
        needed = {COMPUTE[name].reference for name in self.metrics} - {None}
        cache = Path(settings.cache) if settings.cache else default_cache()
        chunk_size, limit = max(settings.chunk_size, _REFERENCE_CHUNK), settings.reference_count
        self.reference = ReferenceStatistics(
            images, self.network, cache, limit, chunk_size, sampling.batch_size, [str(each) for each in needed]
        )
        self.least = check_counts(self.metrics, self.network, settings.count, self.reference)
        self.out = Path(settings.out) if settings.out else sampling.place.home / "evaluation"

    def of(self, sampling: Sampling, count: int | None = None) -> Measurement:
        """The measurement of one point; with another number of images, if that is given."""
        return Measurement(sampling, self.reference, self.metrics, self.settings, self.out, count)

    def measure(self, points: list[Measurement], rank: int, world_size: int, deadline: Deadline) -> list[Measurement]:
        """Do this process's share of these points, as time allows; returns those whose results are complete."""
        with Display(rank, "reading the reference", "chunk") as display:
            self.reference.work(rank, world_size, display)
        with suppress(OutOfTimeError):
            for number, each in enumerate(points, 1):
                words = f"{number}/{len(points)}: {each.title}" if len(points) > 1 else each.title
                with Display(rank, words, "chunk") as display:
                    each.work(rank, world_size, display, deadline)
                each.finalize()
        # Whoever comes last finds what the others have left.
        return [each for each in points if each.finalize()]


def take_times(measurements: list[Measurement], rounds: int, again: bool, deadline: Deadline) -> None:
    """Time all points in turns, unless that has been done: under equal conditions, whatever else the machine does.

    Raises:
        OutOfTimeError: at the deadline; no times are taken then, for they would not compare.
    """
    with measurements[0].lock():  # the first of several processes does it
        if not again and all(each.timed for each in measurements):
            return
        seconds: dict[Measurement, list[float]] = {each: [] for each in measurements}
        for _ in track(range(rounds), "timing", console=Console(stderr=True), transient=True):
            for each in measurements:
                deadline.check()
                seconds[each].append(each.time_batch())
        for each in measurements:
            each.set_time(seconds[each])


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "weights": lambda plan: str(plan["weights"]),
    "guidance": lambda plan: f"{plan['guidance']['scale']:g}",
    "guiding branch": lambda plan: weak_words(plan["guidance"]) or "-",
    "drop": lambda plan: f"{plan['guidance']['drop_fraction']:g}",
    "cache": lambda plan: f"{plan['sampler']['cache']:g}",
}
"""What distinguishes points, for the table."""


def table(results: list[Result]) -> Table:
    """Figures, and what they stand for."""
    first, plan = results[0].values, results[0].plan
    sampler, guidance = plan["sampler"], plan["guidance"]
    cells = {heading: [show(result.plan) for result in results] for heading, show in _COLUMNS.items()}
    varying = [heading for heading, values in cells.items() if heading == "drop" or len(set(values)) > 1]
    scale = "" if "guidance" in varying else f", guidance {guidance['scale']:g}"
    decay = "" if results[0].ema_decay is None else f" of decay {results[0].ema_decay:g}"
    weights = "" if "weights" in varying else f", {plan['weights']} weights{decay}"
    cache = "" if "cache" in varying or not sampler["cache"] else f", cache {sampler['cache']:g}"
    weak = "" if "guiding branch" in varying or guidance["scale"] == 1 else f", guiding branch: {weak_words(guidance)}"
    title = (
        f"{first['run']}, {step_words(plan['step'])}{weights}, {plan['precision']}:"
        f" {plan['count']} images, {plan['labels']} labels, {rounding_words(plan)},"
        f" {sampler['name']} {sampler['steps']} steps{clip_words(sampler)}{cache}{scale}{weak}."
        f" Features of {plan['features']['name']}, {reference_words(first)}."
        f" Time on {first['device']}, batches of {first['timing']['batch_size']}"
    )
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    figures = figures_of_metrics(plan["metrics"])
    arrows = [f"{figure.heading} {'↑' if figure.higher_is_better else '↓'}" for figure in figures]
    several = len(results) > 1
    for heading in (*varying, *arrows, "keep ratio", "TFLOPs", "ms/image", *(["Pareto"] if several else [])):
        shown.add_column(heading, justify="right")
    front = {id(result) for result in pareto(results, figures[0])}
    for number, result in enumerate(results):
        values = result.values
        row = [cells[heading][number] for heading in varying]
        row += [f"{result.figure(figure.key):.4g}" for figure in figures]
        row.append(f"{values['keep_ratio']['mean']:.1%}" if "keep_ratio" in values else "-")
        row += [f"{values['tflops_per_image']:.3g}", f"{values['milliseconds_per_image']:.3g}"]
        shown.add_row(*row, *(["●" if id(result) in front else ""] if several else []))
    return shown


def remarks(results: list[Result]) -> list[str]:
    """What the table does not say: the best guidance at each budget, and how comparable the figures are."""
    found = [f"Best at its budget: {words}" for words in best_words(results)]
    if len(results) > 1:
        figure = figures_of_metrics(results[0].plan["metrics"])[0]
        best = best_of(results, figure)
        found.append(f"Best of all: {figure.heading} {best.figure(figure.key):.4g}, {point_words(best.plan)}")
        found.append("●: no other point is both better and cheaper in TFLOPs")
    if any(result.plan["sampler"]["cache"] for result in results):
        found.append("Keep ratios are means of all evaluations: of those that reused features none was kept")
    differences = differences_from_published(results[0].values)
    if differences:
        found.append(f"Not comparable with published figures: {'; '.join(differences)}")
    else:
        found.append("Measured as published figures are: FID-50K against the statistics that come with the reference")
    return found
