"""All budgets of an evaluation: set up, measured by any number of processes, timed in turns, and shown."""

from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dcdit.errors import UserError
from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.images import open_images
from dcdit.evaluation.measure import Measurement
from dcdit.evaluation.metrics import check_metrics
from dcdit.evaluation.reference_images import ReferenceStatistics, default_cache
from dcdit.evaluation.results import step_words
from dcdit.evaluation.settings import METRICS, EvaluateSettings
from dcdit.runtime.display import Display
from dcdit.sampling.setup import Sampling

_REFERENCE_CHUNK = 500
"""Images of a task on the reference at least: reading is quick."""


def build_features(spec: DictConfig, device: torch.device) -> FeatureNetwork:
    """The feature network that the user's configuration names; UserError if it cannot be had."""
    try:
        network = hydra.utils.instantiate(spec)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is not set: give {error.full_key}=...") from None
    except InstantiationException as error:
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


def measurements_of(sampling: Sampling, settings: EvaluateSettings, features: DictConfig) -> list[Measurement]:
    """One measurement for each budget, everything loaded and checked; UserError naming key, value and remedy."""
    fractions = settings.drop_fractions
    budgets = [sampling] if fractions is None else [sampling.at_drop(drop) for drop in dict.fromkeys(fractions)]
    device = sampling.model.device
    network = build_features(features, device)
    size = sampling.decode.size(sampling.model.latents, device)
    images = open_images(settings.reference, size, device, sampling.plan.settings.autoencoder)
    cache = Path(settings.cache) if settings.cache else default_cache()
    chunk_size = max(settings.chunk_size, _REFERENCE_CHUNK)
    reference = ReferenceStatistics(images, network, cache, settings.reference_count, chunk_size, sampling.batch_size)
    check_metrics(settings.metrics, network, settings.count, reference.count)
    out = Path(settings.out) if settings.out else sampling.place.home / "evaluation"
    return [Measurement(each, reference, network, settings, out) for each in budgets]


def measure(measurements: list[Measurement], rank: int, world_size: int) -> list[Measurement]:
    """Do this process's share and write the results that are complete; returns these."""
    with Display(rank, "reading the reference", "chunk") as display:
        measurements[0].reference.work(rank, world_size, display)
    for each in measurements:
        with Display(rank, each.title, "chunk") as display:
            each.work(rank, world_size, display)
        each.finalize()
    # Whoever comes last finds what the others have left.
    return [each for each in measurements if each.finalize()]


def take_times(measurements: list[Measurement], rounds: int, again: bool) -> None:
    """Time all budgets in turns, unless that has been done: under equal conditions, whatever else the machine does."""
    with measurements[0].lock():  # the first of several processes does it
        if not again and all(each.timed for each in measurements):
            return
        seconds: dict[Measurement, list[float]] = {each: [] for each in measurements}
        for _ in track(range(rounds), "timing", console=Console(stderr=True), transient=True):
            for each in measurements:
                seconds[each].append(each.time_batch())
        for each in measurements:
            each.set_time(seconds[each])


def table(measurements: list[Measurement]) -> Table:
    """Figures, and what they stand for."""
    found: list[dict[str, Any]] = [each.read() for each in measurements]
    plan = found[0]["plan"]
    sampler, guidance = plan["sampler"], plan["guidance"]
    title = (
        f"{found[0]['run']}, {step_words(plan['step'])}, {plan['weights']} weights, {plan['precision']}:"
        f" {plan['count']} images, {plan['labels']} labels,"
        f" {sampler['name']} {sampler['steps']} steps, guidance {guidance['scale']:g}."
        f" Features of {plan['features']['name']}, against {plan['reference']['count']} of {found[0]['reference']}."
        f" Time on {found[0]['device']}, batches of {found[0]['timing']['batch_size']}"
    )
    shown = Table(title=title, title_justify="left")
    headings = [METRICS[name].heading for name in plan["metrics"]]
    for heading in ("drop", *headings, "keep ratio", "TFLOPs", "ms/image"):
        shown.add_column(heading, justify="right")
    for result in found:
        metrics, figures = result["metrics"], [f"{result['plan']['guidance']['drop_fraction']:g}"]
        for name in plan["metrics"]:
            key = METRICS[name].key
            deviation = metrics.get(f"{key}_std")
            figures.append(f"{metrics[key]:.4g}" + (f" ± {deviation:.2g}" if deviation is not None else ""))
        figures.append(f"{result['keep_ratio']['mean']:.1%}" if "keep_ratio" in result else "-")
        shown.add_row(*figures, f"{result['tflops_per_image']:.3g}", f"{result['milliseconds_per_image']:.3g}")
    return shown
