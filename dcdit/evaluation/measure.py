"""One point of the quality-compute curve: images of one checkpoint at one budget, measured."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from dcdit.compute.flops import Cost
from dcdit.evaluation.features import FeatureNetwork, Features
from dcdit.evaluation.metrics import Statistics, compare
from dcdit.evaluation.reference import FeatureJob, Reference, digest_of
from dcdit.network import DCDiT
from dcdit.runtime.devices import device_words, fingerprint
from dcdit.runtime.jobs import write_json
from dcdit.runtime.progress import Display
from dcdit.sampling.figures import save_grid
from dcdit.sampling.generate import Drawn
from dcdit.sampling.setup import Drawing

SCHEMA = 1


class Point:
    """Draws images at one budget and measures them; the result is ``<name>.json`` and a strip of the first as PNG.

    Args:
        drawing: what draws, its budget set.
        reference: what the images are compared with.
        network: by whose features.
        metrics: names, see :data:`dcdit.evaluation.metrics.METRICS`.
        count: images.
        part: images of a unit of work.
        shown: images of the strip.
        out: folder of the results.
    """

    def __init__(
        self,
        drawing: Drawing,
        reference: Reference,
        network: FeatureNetwork,
        metrics: Sequence[str],
        count: int,
        part: int,
        shown: int,
        out: Path,
    ) -> None:
        self.drawing, self.reference, self.network = drawing, reference, network
        self.metrics, self.shown, self.out = list(metrics), min(shown, part, count), out
        self.labels = torch.arange(count) % len(drawing.model.classes)
        self.plan = {
            **drawing.described(),
            "checkpoint": fingerprint(drawing.model.network),
            "count": count,
            "batch_size": drawing.common.batch_size,
            "features": network.described(),
            "reference": reference.plan,
            "metrics": self.metrics,
        }
        guidance, sampler = drawing.guidance, drawing.sampler
        self.name = f"step{drawing.model.step}_{sampler.name}{sampler.steps}_cfg{guidance.scale:g}"
        self.name += f"_drop{guidance.drop_fraction:g}_{digest_of(self.plan)}"
        self.path = out / f"{self.name}.json"
        self._job = FeatureJob(self.path, "evaluation", {**self.plan, "part": part}, count, part)
        self._cost = Cost.of_network(drawing.model.network)

    @property
    def title(self) -> str:
        """For people."""
        return f"drop fraction {self.drawing.guidance.drop_fraction:g}"

    @property
    def concluded(self) -> bool:
        """Whether it was this process that wrote the result."""
        return self._job.concluded

    @property
    def _batch(self) -> int:
        """Images drawn at once."""
        return min(self.drawing.common.batch_size, self._job.part, self._job.count)

    @property
    def timed(self) -> bool:
        """Whether :meth:`set_time` was called on the result."""
        return bool(json.loads(self.path.read_text())["timing"]["rounds"])

    def lock(self) -> FileLock:
        """Held by one of several processes."""
        return self._job.lock()

    def time_batch(self) -> float:
        """Seconds that one batch takes, decoding apart."""
        begin = time.perf_counter()
        for _ in self.drawing.generate(self.labels, range(self._batch)):
            pass
        return time.perf_counter() - begin

    def set_time(self, seconds: Sequence[float]) -> None:
        """Put what batches took into the result; the median stands for all."""
        result = json.loads(self.path.read_text())
        result["milliseconds_per_image"] = 1000 * median(seconds) / self._batch
        result["timing"]["rounds"] = [1000 * each / self._batch for each in seconds]
        write_json(self.path, result)

    def work(self, rank: int, world_size: int, display: Display) -> None:
        """This process's share of the images, unless the result is there."""
        self._job.share(rank, world_size, lambda unit: self._draw(unit, display), display)

    def _draw(self, unit: int, display: Display) -> None:
        seen: list[Features] = []
        first: list[Tensor] = []
        seconds, flops, images = 0.0, 0.0, 0
        kept = torch.zeros(2, self.drawing.sampler.steps, dtype=torch.int64)  # by half and step
        batches = self.drawing.generate(self.labels, self._job.numbers(unit))
        begin = time.perf_counter()
        while (drawn := next(batches, None)) is not None:
            seconds += time.perf_counter() - begin
            pixels = self.drawing.decode(drawn.latents)
            if unit == 0 and images < self.shown:
                first.append(pixels)
            seen.append(self.network(pixels))
            flops += drawn.flops(self._cost).sum().item()
            images += len(drawn.indices)
            kept += _kept(drawn)
            display.advance(len(drawn.indices))
            begin = time.perf_counter()
        if first:
            save_grid(torch.cat(first)[: self.shown], self.shown, self.path.with_suffix(".png"))
        logits = [each.logits for each in seen if each.logits is not None]
        found = Features(torch.cat([each.features for each in seen]), torch.cat(logits) if logits else None)
        record = {"seconds": seconds, "flops": flops, "kept": kept.tolist()}
        self._job.keep(unit, found, record)

    def conclude(self) -> bool:
        """Compute and write the result if all images and the reference are there; whether it is written."""
        if self.path.is_file():
            return True
        reference = self.reference.conclude()
        if reference is not None:
            self._job.conclude(self.path, lambda records: self._write(reference, records))
        return self.path.is_file()

    def _write(self, reference: Statistics, records: list[dict[str, Any]]) -> None:
        count, model = self._job.count, self.drawing.model
        checkpoint = Path(self.drawing.common.checkpoint)
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "run": run_name(checkpoint),
            "checkpoint": str(checkpoint),
            "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
            "training": dict(model.training),
            "plan": self.plan,
            "metrics": compare(reference, self._job.features, self.metrics),
            "tflops_per_image": sum(record["flops"] for record in records) / count / 1e12,
            # until a quiet moment, see `set_time`: while measuring, other things may have run beside it
            "milliseconds_per_image": 1000 * sum(record["seconds"] for record in records) / count,
            "timing": {"rounds": [], "batch_size": self._batch},
            "reference": self.reference.images.place,
            "device": device_words(model.device),
        }
        if isinstance(model.network, DCDiT):
            result["kept"] = self._kept_shares([record["kept"] for record in records])
        write_json(self.path, result)

    def _kept_shares(self, sums: Sequence[Sequence[Sequence[int]]]) -> Mapping[str, Any]:
        """Kept share of the positions at every step, by half."""
        drawing = self.drawing
        height, width = drawing.model.latents["shape"][1:]
        shares = torch.tensor(sums, dtype=torch.float64).sum(dim=0) / (self._job.count * height * width)
        timesteps = drawing.sampler.scheduler().timesteps.tolist()
        guided = torch.tensor([drawing.guidance.is_guided(timestep) for timestep in timesteps])
        both = torch.cat([shares[0], shares[1][guided]])
        return {
            "share": both.mean().item(),
            "timesteps": timesteps,
            "conditional": shares[0].tolist(),
            "unconditional": [share if ran else None for share, ran in zip(shares[1].tolist(), guided, strict=True)],
        }


def _kept(drawn: Drawn) -> Tensor:
    """Tokens kept in a batch, (2, steps) int64: by half and step."""
    size = len(drawn.indices)
    sums = [[lengths[:size].sum(), lengths[size:].sum()] for lengths in drawn.lengths]
    return torch.tensor(sums, dtype=torch.int64).T


def run_name(checkpoint: Path) -> str:
    """Name of the run that ``checkpoint`` belongs to; with that of its sweep, if it is part of one."""
    run = checkpoint.resolve().parent.parent
    sweep = run.parent.name
    return f"{sweep.removesuffix('_sweep')}/{run.name}" if sweep.endswith("_sweep") else run.name
