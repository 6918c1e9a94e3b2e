"""All points of an evaluation: what they share, measured by any number of processes, and timed in turns."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from dcdit.errors import UserError
from dcdit.evaluation.descriptions import describe_point
from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.images import open_images
from dcdit.evaluation.measure import Deadline, Measurement, OutOfTimeError
from dcdit.evaluation.metrics import compare_with
from dcdit.evaluation.settings import EvaluateSettings
from dcdit.runtime.display import Console, Display
from dcdit.sampling.setup import Sampling
from dcdit.settings.instantiate import instantiated


def build_features(spec: Mapping[str, Any], device: torch.device) -> FeatureNetwork:
    """Build the feature network that the user's configuration names; raise UserError if it cannot be had."""
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
        decoding = (sampling.config.autoencoder, sampling.config.rounding)
        images = open_images(settings.reference, size, device, *decoding, network=sampling.model.latents)
        self.network = build_features(settings.features, device)  # perhaps a download: after the checks
        self.reference, self.metrics, self.least = compare_with(
            images,
            self.network,
            settings.metrics,
            settings.count,
            cache=settings.cache,
            batch_size=sampling.config.batch_size,
            limit=settings.reference_count,
            chunk_size=settings.chunk_size,
        )
        self.out = Path(settings.out) if settings.out else sampling.source.home / "evaluation"

    def of(self, sampling: Sampling, count: int | None = None) -> Measurement:
        """Return the measurement of one point, with another number of images if ``count`` is given."""
        return Measurement(sampling, self.reference, self.metrics, self.settings, self.out, count)

    def measure(self, points: list[Measurement], rank: int, world_size: int, deadline: Deadline) -> list[Measurement]:
        """Do this process's share of these points, as time allows; return those whose results are complete."""
        with Display(rank, "reading the reference", "chunk") as display:
            self.reference.work(rank, world_size, display)
        with suppress(OutOfTimeError):
            for number, point in enumerate(points, 1):
                title = (f"{number}/{len(points)}: " if len(points) > 1 else "") + describe_point(point.plan)
                with Display(rank, title, "chunk") as display:
                    point.work(rank, world_size, display, deadline)
                point.finalize()
        # The process that comes last finalizes what the others have left.
        return [point for point in points if point.finalize()]


def take_times(measurements: list[Measurement], rounds: int, renew: bool, deadline: Deadline) -> None:
    """Time all points in turns, unless that has been done: under equal conditions, whatever else the machine does.

    Raises:
        OutOfTimeError: at the deadline; no times are taken then, for they would not compare.
    """
    with measurements[0].job.lock():  # the first of several processes does it
        if not renew and all(measurement.result.timing.rounds for measurement in measurements):
            return
        seconds: dict[Measurement, list[float]] = {measurement: [] for measurement in measurements}
        for _ in track(range(rounds), "timing", console=Console(stderr=True), transient=True):
            for measurement in measurements:
                deadline.check()
                seconds[measurement].append(measurement.time_batch())
        for measurement in measurements:
            measurement.set_time(seconds[measurement])
