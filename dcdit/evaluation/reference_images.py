"""Features of many images, in chunks that are kept as files, and statistics of references made of them."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcdit.errors import naming
from dcdit.evaluation.features import FeatureNetwork, Features
from dcdit.evaluation.image_set import ImageSet
from dcdit.evaluation.statistics import Moments, Statistics
from dcdit.runtime.display import Display
from dcdit.runtime.files import content_digest, make_writable_folder, read_arrays
from dcdit.runtime.jobs import ImageJob, Record


def default_cache() -> Path:
    """Return the folder in which statistics of references are kept unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcdit"


class FeatureJob(ImageJob[Record]):
    """A job whose tasks leave features behind.

    Args:
        kind, result, name, fingerprint, count, chunk_size: see :class:`ImageJob`.
    """

    def __init__(
        self, kind: type[Record], result: Path, name: str, fingerprint: Mapping[str, Any], count: int, chunk_size: int
    ) -> None:
        super().__init__(kind, result, f"{name}-{content_digest(fingerprint)[:12]}", fingerprint, count, chunk_size)

    def share(self, rank: int, world_size: int, work: Callable[[int], None], display: Display) -> None:
        """Do this process's share, unless the result is there; ``work`` ends with :meth:`keep`."""
        make_writable_folder(self.directory, self.result.name)
        with self.lock():
            if self.result.is_file():
                return
            self.check_fingerprint()
        self.do(rank, world_size, work, display)

    def part_path(self, task: int) -> Path:
        """Return the file of a task's features."""
        return self.work / f"chunk-{task:06d}.npz"

    def keep(self, task: int, features: Sequence[Features], record: Record) -> None:
        """Finish a task: keep the features of its batches, and what is recorded of it."""
        arrays: dict[str, Any] = {}
        for name, parts in zip(Features._fields, zip(*features, strict=True), strict=True):
            tensors = [part for part in parts if part is not None]
            arrays[name] = torch.cat(tensors).numpy() if tensors else np.empty((0, 0), np.float32)
        self.finish(task, record, lambda file: np.savez(file, **arrays))

    def features(self) -> Iterator[Features]:
        """Yield the features of all tasks, one task after the other."""
        for task in range(self.tasks):
            stored = read_arrays(self.part_path(task), Features._fields, "the same command makes it again")
            features, *others = (torch.from_numpy(array) for array in stored.values())
            yield Features(features, *(tensor if tensor.numel() else None for tensor in others))


def see_images(
    images: ImageSet, numbers: Sequence[int], network: FeatureNetwork, batch_size: int, on_batch: Callable[[int], None]
) -> Iterator[Features]:
    """Yield the features of the images of these numbers, batch by batch.

    Args:
        images, numbers: what to look at.
        network: looks.
        batch_size: images per forward pass.
        on_batch: called with the number of images after every batch.

    Raises:
        UserError: naming the image, if it cannot be read or its features are not finite.
    """
    for start in range(0, len(numbers), batch_size):
        batch = list(numbers[start : start + batch_size])
        with naming(f"{images.key}={images.source}, image", batch):
            yield network(images.read(batch))
        on_batch(len(batch))


def evenly_spaced(count: int, total: int) -> list[int]:
    """Return the numbers of ``count`` of ``total`` images, evenly spaced."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


@dataclass(frozen=True)
class Nothing:
    """The empty record of a task that leaves nothing but features."""


class ReferenceStatistics:
    """Statistics of a set of images: those that come with it, and those that are computed once of the images and kept.

    Args:
        images: the images.
        network: the feature network.
        cache: directory in which statistics are kept, by a name that includes all they depend on.
        limit: number of images to take, evenly spaced; None takes all.
        chunk_size: images of a task.
        batch_size: images per forward pass.
        needed: what is needed, of ``features``, ``spatial`` and ``images``; no image is read if what comes with the
            images is enough.

    Attributes:
        count: how many images are read; 0 if none need be.
        features: description of the network, as plain values.
        description: of the reference, as :class:`dcdit.evaluation.plans.ReferenceDescription`.
        published: which statistics come with the images: ``features``, ``spatial``.
    """

    def __init__(
        self,
        images: ImageSet,
        network: FeatureNetwork,
        cache: Path,
        limit: int | None,
        chunk_size: int,
        batch_size: int,
        needed: Collection[str] = ("features", "spatial", "images"),
    ) -> None:
        self.images, self.network, self.batch_size = images, network, batch_size
        self._statistics: Statistics | None = None
        self._moments = images.moments(network)
        self.published = [kind for kind in self._moments if kind in needed]
        sufficient = set(needed) <= set(self.published)
        self.count = 0 if sufficient else min(images.count, limit or images.count)
        self.features = network.described()
        identity = {"images": images.described(), "features": self.features, "count": self.count}
        self.description = {**identity, "published": self.published}
        self.path = cache / f"reference-{content_digest(identity)[:12]}.npz"
        self._job = FeatureJob(
            Nothing, self.path, "reference", {**identity, "chunk_size": chunk_size}, self.count, chunk_size
        )
        self._numbers = evenly_spaced(self.count, images.count)

    def work(self, rank: int, world_size: int, display: Display) -> None:
        """Do this process's share, unless the statistics are there."""
        if not self.count:
            return
        self._job.share(rank, world_size, lambda task: self._see(task, display), display)
        self.finalize()

    def _see(self, task: int, display: Display) -> None:
        numbers = [self._numbers[number] for number in self._job.numbers(task)]
        seen = see_images(self.images, numbers, self.network, self.batch_size, display.advance)
        features = [features._replace(logits=None) for features in seen]
        self._job.keep(task, features, Nothing())

    def finalize(self) -> Statistics | None:
        """Return the statistics, computed from the chunks if need be; None while other processes work on these."""
        if self._statistics is None:
            self._statistics = self._compute()
        return self._statistics

    def _compute(self) -> Statistics | None:
        computed = Statistics(Moments.none(), Moments.none(), torch.zeros(0, self.network.num_features))
        if self.count:
            self._job.finalize(self.path, self._save)
            if not self.path.is_file():
                return None
            computed = Statistics.load(self.path)
        moments = self._moments.get("features", computed.moments)
        spatial = self._moments.get("spatial", computed.spatial)
        return Statistics(moments, spatial, computed.features)

    def _save(self, records: list[Nothing]) -> None:
        Statistics.of(self._job.features(), self.count).save(self.path)
