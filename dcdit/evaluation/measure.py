"""One measurement: images of one checkpoint at one budget and guidance, and the figures of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dcdit.checkpoints.load import title_with_additions
from dcdit.errors import naming
from dcdit.evaluation.features import FeatureNetwork, Features
from dcdit.evaluation.metrics import compare
from dcdit.evaluation.plans import MeasuredPlan
from dcdit.evaluation.reference_images import FeatureJob, ReferenceStatistics
from dcdit.evaluation.results import SCHEMA, KeepRatio, NetworkDescription, Result, Timing, read_result
from dcdit.evaluation.settings import EvaluateSettings
from dcdit.evaluation.statistics import Statistics
from dcdit.runtime.devices import describe_device
from dcdit.runtime.display import Display
from dcdit.runtime.files import content_digest
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.figures import save_grid
from dcdit.sampling.generate import SampleBatch, labels_of
from dcdit.sampling.setup import Sampling


class OutOfTimeError(Exception):
    """The deadline of an evaluation has passed."""


@dataclass(frozen=True)
class Deadline:
    """The time after which an evaluation begins no more work.

    Attributes:
        end: that time, by ``time.monotonic``; None if there is none.
    """

    end: float | None = None

    @classmethod
    def in_hours(cls, hours: float | None) -> "Deadline":
        """Return the deadline that is ``hours`` from now."""
        return cls(None if hours is None else time.monotonic() + 3600 * hours)

    @property
    def over(self) -> bool:
        """Whether the deadline has passed."""
        return self.end is not None and time.monotonic() > self.end

    def check(self) -> None:
        """Raise :class:`OutOfTimeError` if the deadline has passed."""
        if self.over:
            raise OutOfTimeError


@dataclass(frozen=True)
class SampledChunk:
    """What is recorded of a chunk of sampled images.

    Attributes:
        seconds: that sampling took, decoding apart.
        cost: FLOPs and kept tokens.
    """

    seconds: float
    cost: SamplingCost


@dataclass(frozen=True)
class MeasuredSamples:
    """A number of samples, seen by a feature network.

    Attributes:
        features: of the images, batch by batch.
        first: (n, 1 or 3, height, width) uint8, the first images.
        sampled: what is recorded of them.
    """

    features: list[Features]
    first: Tensor
    sampled: SampledChunk


def measure_samples(
    batches: Iterator[SampleBatch],
    decode: Callable[[Tensor], Tensor],
    network: FeatureNetwork,
    metrics: Sequence[str],
    shown: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> MeasuredSamples:
    """Sample, decode, look at the images, and add up what sampling cost.

    Args:
        batches: of samples; taking the next one samples it.
        decode: latents (n, C, H, W) to images (n, 1 or 3, height, width) uint8.
        network: sees the images.
        metrics: which features are kept: spatial ones for ``sfid`` alone.
        shown: how many of the first images are kept.
        on_batch: called with the number of images after every batch.

    Raises:
        UserError: naming the sample, if an image or its features are not finite.
    """
    kept: list[Features] = []
    first: list[Tensor] = []
    seconds, cost = 0.0, SamplingCost()
    begin = time.perf_counter()
    while (batch := next(batches, None)) is not None:
        seconds += time.perf_counter() - begin
        with naming("sample", batch.indices):
            images = decode(batch.latents)
            features = network(images)
        if cost.images < shown:
            first.append(images)
        kept.append(features if "sfid" in metrics else features._replace(spatial=None))
        cost += SamplingCost.of(batch)
        on_batch(len(batch.indices))
        begin = time.perf_counter()
    return MeasuredSamples(kept, torch.cat(first)[:shown] if first else torch.empty(0), SampledChunk(seconds, cost))


def _name_of(sampling: Sampling) -> str:
    """Return what the name of a result begins with: step, sampler, and what is usually varied."""
    guidance, sampler = sampling.guidance.settings, sampling.sampler.settings
    step = "" if sampling.model.step is None else f"step{sampling.model.step}_"
    cache = f"_cache{sampler.cache:g}" if sampler.cache else ""
    weak = "" if guidance.uncond_drop_fraction is None else f"_weak{guidance.uncond_drop_fraction:g}"
    every = "" if guidance.every == 1 else f"_every{guidance.every}"
    budget = f"drop{guidance.drop_fraction:g}{cache}{weak}{every}"
    return f"{step}{sampler.name}{sampler.steps}_cfg{guidance.scale:g}_{budget}"


class Measurement:
    """Samples images at one point and measures them; the result is ``<name>.json`` and a preview of the first as PNG.

    Args:
        sampling: what samples, its budget set.
        reference: what the images are compared with, and the feature network.
        metrics: names of the metrics.
        settings: number of images, and how they are divided into tasks.
        out: folder of the results.
        count: number of images, if it is another than the settings say.
    """

    def __init__(
        self,
        sampling: Sampling,
        reference: ReferenceStatistics,
        metrics: list[str],
        settings: EvaluateSettings,
        out: Path,
        count: int | None = None,
    ) -> None:
        self.sampling, self.reference, self.metrics = sampling, reference, metrics
        count, chunk_size = count or settings.count, settings.chunk_size
        self.shown = min(settings.shown, chunk_size, count)
        classes = sampling.model.network.num_classes
        self.labels = labels_of(settings.labels, count, classes, sampling.config.seed)
        plan = {
            **sampling.described(),
            "checkpoint": sampling.model.digest,
            "count": count,
            "labels": settings.labels,
            "batch_size": sampling.config.batch_size,
            "features": reference.features,
            "reference": reference.description,
            "metrics": metrics,
        }
        self.plan = MeasuredPlan.of(plan)
        chunks = {"chunk_size": chunk_size} if "capacity" in plan else {}  # which share the room
        digest = content_digest({"schema": SCHEMA, **plan, **chunks})[
            :12
        ]  # what another release wrote is measured anew
        self.path = out / f"{_name_of(sampling)}_{digest}.json"
        fingerprint = {**plan, "chunk_size": chunk_size}
        self.job = FeatureJob(SampledChunk, self.path, "evaluation", fingerprint, count, chunk_size)

    @property
    def _batch(self) -> int:
        """The number of images that are sampled at once."""
        return min(self.sampling.config.batch_size, self.job.chunk_size, self.job.count)

    @property
    def result(self) -> Result:
        """The result, read from its file and checked; UserError if the file is damaged."""
        return read_result(self.path)

    def time_batch(self) -> float:
        """Return the seconds that sampling one batch takes, decoding apart."""
        begin = time.perf_counter()
        for _ in self.sampling.generate(self.labels, range(self._batch)):
            pass
        return time.perf_counter() - begin

    def set_time(self, seconds: Sequence[float]) -> None:
        """Put the ``seconds`` that batches took into the result; the median stands for all."""
        rounds = [1000 * duration / self._batch for duration in seconds]
        result = self.result
        timing = replace(result.timing, rounds=rounds)
        replace(result, milliseconds_per_image=1000 * median(seconds) / self._batch, timing=timing).write()

    def work(self, rank: int, world_size: int, display: Display, deadline: Deadline) -> None:
        """Sample this process's share, unless the result is there; raise OutOfTimeError at the deadline."""

        def sample(task: int) -> None:
            deadline.check()
            self._sample(task, display)

        self.job.share(rank, world_size, sample, display)

    def _sample(self, task: int, display: Display) -> None:
        batches = self.sampling.generate(self.labels, self.job.numbers(task))
        shown = self.shown if task == 0 else 0
        measured = measure_samples(
            batches, self.sampling.decode, self.reference.network, self.metrics, shown, display.advance
        )
        if shown:
            save_grid(measured.first, shown, self.path.with_suffix(".png"))
        self.job.keep(task, measured.features, measured.sampled)

    def finalize(self) -> bool:
        """Compute and write the result if all images and the reference are there; return whether it is written."""
        if self.path.is_file():
            return True
        reference = self.reference.finalize()
        if reference is not None:
            self.job.finalize(self.path, lambda records: self._write(reference, records))
        return self.path.is_file()

    def _write(self, reference: Statistics, records: list[SampledChunk]) -> None:
        model, source = self.sampling.model, self.sampling.source
        cost = SamplingCost.total(record.cost for record in records)
        title = title_with_additions(model.network.title, model.network, model)
        Result(
            run=source.run,
            checkpoint=source.name,
            network=NetworkDescription(title, model.network.routes),
            parameters=sum(parameter.numel() for parameter in model.network.parameters()),
            training=dict(model.training),
            plan=self.plan,
            metrics=compare(reference, self.job.features, self.metrics),
            tflops_per_image=cost.tflops_per_image,
            # until a quiet moment, see `set_time`: while measuring, other things may have run beside it
            milliseconds_per_image=1000 * sum(record.seconds for record in records) / cost.images,
            timing=Timing([], self._batch),
            reference=self.reference.images.source,
            device=describe_device(model.device),
            keep_ratio=self._keep_ratio(cost) if model.network.routes else None,
            dropped_by_capacity=cost.dropped(model.latents.positions),
            path=self.path,
        ).write()

    def _keep_ratio(self, cost: SamplingCost) -> KeepRatio:
        positions = self.sampling.model.latents.positions
        main, guiding = cost.keep_ratios(positions)
        mean = cost.mean_keep_ratio(positions)
        assert mean is not None
        return KeepRatio(mean, self.sampling.sampler.timesteps, [ratio or 0.0 for ratio in main], guiding)
