"""One measurement: images of one checkpoint at one budget and guidance, and the figures of them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from dcdit.errors import naming
from dcdit.evaluation.features import Features
from dcdit.evaluation.metrics import compare
from dcdit.evaluation.reference_images import FeatureJob, ReferenceStatistics, digest_of
from dcdit.evaluation.results import SCHEMA, Result, read_result
from dcdit.evaluation.settings import EvaluateSettings
from dcdit.evaluation.statistics import Statistics
from dcdit.evaluation.words import point_words
from dcdit.runtime.devices import describe_device
from dcdit.runtime.display import Display
from dcdit.runtime.files import write_json
from dcdit.sampling.figures import save_grid
from dcdit.sampling.generate import labels_of
from dcdit.sampling.setup import Sampling


class OutOfTimeError(Exception):
    """The time that was given is over."""


@dataclass(frozen=True)
class Deadline:
    """The time that was given.

    Attributes:
        end: of it, by ``time.monotonic``; None for all the time that is needed.
    """

    end: float | None = None

    @classmethod
    def in_hours(cls, hours: float | None) -> "Deadline":
        """So many hours from now."""
        return cls(None if hours is None else time.monotonic() + 3600 * hours)

    @property
    def over(self) -> bool:
        """Whether it is."""
        return self.end is not None and time.monotonic() > self.end

    def check(self) -> None:
        """Raise :class:`OutOfTimeError` if it is over."""
        if self.over:
            raise OutOfTimeError


@dataclass(frozen=True)
class Sampled:
    """What is recorded of a chunk of sampled images.

    Attributes:
        seconds: that sampling took, decoding apart.
        flops: that the networks' tokens cost.
        kept: tokens kept at each step by the strong and by the weak half: (2, steps).
    """

    seconds: float
    flops: float
    kept: tuple[list[int], list[int]]


class Measurement:
    """Samples images at one point and measures them; the result is ``<name>.json`` and a preview of the first as PNG.

    Args:
        sampling: what samples, its budget set.
        reference: what the images are compared with, and by whose features.
        metrics: which.
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
        self.sampling, self.reference, self.network, self.metrics = sampling, reference, reference.network, metrics
        count, chunk_size = count or settings.count, settings.chunk_size
        self.shown, self.out = min(settings.shown, chunk_size, count), out
        seed, classes = sampling.plan.settings.seed, sampling.model.network.num_classes
        self.labels = labels_of(settings.labels, count, classes, seed)
        self.plan = {
            **sampling.described(),
            "checkpoint": sampling.model.digest,
            "count": count,
            "labels": settings.labels,
            "batch_size": sampling.batch_size,
            "features": reference.plan["features"],
            "reference": reference.plan,
            "metrics": metrics,
        }
        guidance, sampler = sampling.guidance.settings, sampling.sampler.settings
        step = "" if sampling.model.step is None else f"step{sampling.model.step}_"
        self.name = f"{step}{sampler.name}{sampler.steps}_cfg{guidance.scale:g}_drop{guidance.drop_fraction:g}"
        if sampler.cache:
            self.name += f"_cache{sampler.cache:g}"
        if guidance.uncond_drop_fraction is not None:
            self.name += f"_weak{guidance.uncond_drop_fraction:g}"
        self.name += f"_{digest_of(self.plan)}"
        self.path = out / f"{self.name}.json"
        job_plan = {**self.plan, "chunk_size": chunk_size}
        self._job = FeatureJob(Sampled, self.path, "evaluation", job_plan, count, chunk_size)

    @property
    def title(self) -> str:
        """For people."""
        return point_words(self.plan)

    @property
    def finalized(self) -> bool:
        """Whether it was this process that wrote the result."""
        return self._job.finalized

    @property
    def _batch(self) -> int:
        """Images sampled at once."""
        return min(self.sampling.batch_size, self._job.chunk_size, self._job.count)

    @property
    def timed(self) -> bool:
        """Whether :meth:`set_time` was called on the result."""
        return bool(self.result.values["timing"]["rounds"])

    @property
    def result(self) -> Result:
        """The result, checked; UserError if it is not what was written."""
        return read_result(self.path)

    def lock(self) -> FileLock:
        """Held by one of several processes."""
        return self._job.lock()

    def time_batch(self) -> float:
        """Seconds that one batch takes, decoding apart."""
        begin = time.perf_counter()
        for _ in self.sampling.generate(self.labels, range(self._batch)):
            pass
        return time.perf_counter() - begin

    def set_time(self, seconds: Sequence[float]) -> None:
        """Put what batches took into the result; the median stands for all."""
        result = self.result.values
        result["milliseconds_per_image"] = 1000 * median(seconds) / self._batch
        result["timing"]["rounds"] = [1000 * each / self._batch for each in seconds]
        write_json(self.path, result)

    def work(self, rank: int, world_size: int, display: Display, deadline: Deadline) -> None:
        """This process's share of the images, unless the result is there; raises OutOfTimeError at the deadline."""

        def sample(task: int) -> None:
            deadline.check()
            self._sample(task, display)

        self._job.share(rank, world_size, sample, display)

    def _sample(self, task: int, display: Display) -> None:
        seen: list[Features] = []
        first: list[Tensor] = []
        seconds, flops, images = 0.0, 0.0, 0
        kept = torch.zeros(2, len(self.sampling.sampler.timesteps), dtype=torch.int64)  # by half and step
        batches = self.sampling.generate(self.labels, self._job.numbers(task))
        begin = time.perf_counter()
        while (batch := next(batches, None)) is not None:
            seconds += time.perf_counter() - begin
            pixels = self.sampling.images(batch)
            if task == 0 and images < self.shown:
                first.append(pixels)
            seen.append(self._see(pixels, batch.indices))
            flops += batch.flops.sum().item()
            images += len(batch.indices)
            kept += batch.tokens()
            display.advance(len(batch.indices))
            begin = time.perf_counter()
        if first:
            save_grid(torch.cat(first)[: self.shown], self.shown, self.path.with_suffix(".png"))
        self._job.keep(task, seen, Sampled(seconds, flops, (kept[0].tolist(), kept[1].tolist())))

    def _see(self, images: Tensor, numbers: list[int]) -> Features:
        """What the metrics need of the features of these samples."""
        with naming("sample", numbers):
            found = self.network(images)
        return found if "sfid" in self.metrics else found._replace(spatial=None)

    def finalize(self) -> bool:
        """Compute and write the result if all images and the reference are there; whether it is written."""
        if self.path.is_file():
            return True
        reference = self.reference.finalize()
        if reference is not None:
            self._job.finalize(self.path, lambda records: self._write(reference, records))
        return self.path.is_file()

    def _write(self, reference: Statistics, records: list[Sampled]) -> None:
        count, model = self._job.count, self.sampling.model
        place = self.sampling.place
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "run": place.run,
            "checkpoint": place.name,
            "network": {"title": model.network.title, "routes": model.network.routes},
            "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
            "training": dict(model.training),
            "plan": self.plan,
            "metrics": compare(reference, self._job.features, self.metrics),
            "tflops_per_image": sum(record.flops for record in records) / count / 1e12,
            # until a quiet moment, see `set_time`: while measuring, other things may have run beside it
            "milliseconds_per_image": 1000 * sum(record.seconds for record in records) / count,
            "timing": {"rounds": [], "batch_size": self._batch},
            "reference": self.reference.images.place,
            "device": describe_device(model.device),
        }
        if model.network.routes:
            result["keep_ratio"] = self._keep_ratios([record.kept for record in records])
        write_json(self.path, result)

    def _keep_ratios(self, sums: Sequence[tuple[list[int], list[int]]]) -> Mapping[str, Any]:
        """Keep ratio at every step, by half."""
        sampling = self.sampling
        ratios = torch.tensor(sums, dtype=torch.float64).sum(dim=0) / (
            self._job.count * sampling.model.latents.positions
        )
        timesteps = sampling.sampler.timesteps
        routes = sampling.weak is None or sampling.weak.network.routes
        guided = torch.tensor([routes and sampling.guidance.settings.is_guided(timestep) for timestep in timesteps])
        both = torch.cat([ratios[0], ratios[1][guided]])
        return {
            "mean": both.mean().item(),
            "timesteps": timesteps,
            "strong": ratios[0].tolist(),
            "weak": [ratio if ran else None for ratio, ran in zip(ratios[1].tolist(), guided, strict=True)],
        }
