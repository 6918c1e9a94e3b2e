"""Reading batches in the order of :mod:`dcdit.data.order`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dcdit.data.companions import CompanionReader
from dcdit.data.manifest import Companion, Manifest
from dcdit.data.order import EpochOrder, Position, Readers
from dcdit.data.shards import CorruptSampleError, Layout
from dcdit.data.storage import Location, ShardReader
from dcdit.errors import UserError


class Batch(NamedTuple):
    """A batch for the network.

    Attributes:
        latents: (B, C, H, W) float32, scaled and shifted.
        labels: (B,) int64.
        companion: what companion shards hold of the samples, see :class:`dcdit.data.manifest.Companion`: pixels (B, 3,
            height, width) uint8 or features (B, F, h, w) float16; None where nothing asks for it.
    """

    latents: Tensor
    labels: Tensor
    companion: Tensor | None = None


class Corruption(NamedTuple):
    """A sample that could not be read: its shard, its number within the shard, and the reason."""

    shard: str
    number: int
    reason: str


class StoredBatch(NamedTuple):
    """A batch as it lies in the shards.

    Attributes:
        stored: (B, C, H, W) latents or (B, 2C, H, W) moments, in the stored type.
        labels: (B,) int64.
        seed: for what is random about the batch; a pure function of its position in the order.
        corrupt: samples that could not be read and are missing here.
        companion: see :class:`Batch`.
    """

    stored: Tensor
    labels: Tensor
    seed: int
    corrupt: list[Corruption]
    companion: Tensor | None = None


@dataclass
class Samples:
    """Room for the samples of a batch, filled one after the other.

    Attributes:
        arrays: (B, ...) in the stored type.
        companion: (B, ...) what the companion shards hold of them; None where these are not read.
        labels: of the samples read so far.
        corrupt: samples that could not be read.
    """

    arrays: NDArray[np.generic]
    companion: NDArray[np.generic] | None
    labels: list[int] = field(default_factory=list)
    corrupt: list[Corruption] = field(default_factory=list)

    def batch(self, seed: int) -> StoredBatch:
        """The samples read so far."""
        count = len(self.labels)
        companion = None if self.companion is None else torch.from_numpy(self.companion[:count])
        return StoredBatch(
            torch.from_numpy(self.arrays[:count]), torch.tensor(self.labels), seed, self.corrupt, companion
        )


class SampleReader:
    """Reads samples of a split: latents, labels and, where they are asked for, companions.

    Args:
        location, manifest: the shards.
        companion: companion shards that are read too.
    """

    def __init__(self, location: Location, manifest: Manifest, companion: Companion | None) -> None:
        self.manifest, self._layout = manifest, Layout.of(manifest)
        self._shards = ShardReader(location, manifest.shards)
        self._companions = CompanionReader(location, companion, manifest.hflip) if companion else None

    def prefetch(self, current: Sequence[int], following: Sequence[int]) -> None:
        """See :meth:`ShardReader.prefetch`."""
        self._shards.prefetch(current, following)
        if self._companions:
            self._companions.shards.prefetch(current, following)

    def room(self, count: int) -> Samples:
        """Room for so many samples."""
        arrays = np.empty((count, *self._layout.stored_shape), self._layout.dtype)
        if self._companions is None:
            return Samples(arrays, None)
        shape, dtype = self._companions.companion.shape, self._companions.dtype
        return Samples(arrays, np.empty((count, *shape), dtype))

    def read(self, shard: int, index: int, hflip: bool, samples: Samples) -> None:
        """Read a sample into the next free row; add it to what is corrupt if it cannot be read."""
        row, hflip = len(samples.labels), hflip and self.manifest.hflip
        try:
            array = samples.arrays[row].reshape(-1).view(np.uint8)
            label = self._layout.read(self._shards.descriptor(shard), index, hflip, array)
            if not 0 <= label < len(self.manifest.classes):
                raise CorruptSampleError(f"label {label} is none of {len(self.manifest.classes)} classes")
            if self._companions is not None and samples.companion is not None:
                self._companions.read(shard, index, hflip, label, samples.companion[row])
            samples.labels.append(label)
        except (CorruptSampleError, OSError) as error:
            samples.corrupt.append(Corruption(self.manifest.shards[shard].name, index, str(error)))


class LatentStream(IterableDataset[StoredBatch]):
    """Batches of one rank, epoch after epoch, beginning anywhere, with any number of loader workers.

    A batch may come in several parts, one after the other, which does not change the order. The loader asks its workers
    in turn, so each reads the parts whose turn is its own, and their number does not change the order either. Memory is
    bounded by the batches in flight: the shuffle window is one of places, not of data.

    A sample that cannot be read is left out of its batch and reported with it. Where none of a batch can be read, the
    next readable sample of the rank's epoch stands in, for every rank must yield the same number of batches; where
    there is none, the batch is empty.

    Args:
        location, manifest: the shards.
        readers: who reads together.
        rank: this process among them.
        seed: of everything random.
        position: where to begin.
        epochs: how many epochs to yield; None never ends.
        parts: in which each batch comes.
        companion: companion shards that are read too.

    Raises:
        UserError: if the shards cannot fill one batch of every rank.
    """

    def __init__(
        self,
        location: Location,
        manifest: Manifest,
        readers: Readers,
        rank: int = 0,
        seed: int = 0,
        position: Position = Position(),  # noqa: B008  (immutable)
        epochs: int | None = None,
        parts: int = 1,
        companion: Companion | None = None,
    ) -> None:
        super().__init__()
        self.location = location
        self.manifest = manifest
        self.readers = readers
        self.rank = rank
        self.seed = seed
        self.position = position.join(readers)
        self.epochs = epochs
        self.parts = parts
        self.companion = companion
        if not readers.batches(manifest.samples):
            raise UserError(
                f"data.batch_size={readers.world_size * readers.batch_size} exceeds the {manifest.samples} samples in"
                f" {location.root}: lower data.batch_size"
            )

    def __iter__(self) -> Iterator[StoredBatch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        sizes = [shard.samples for shard in self.manifest.shards]
        reader = SampleReader(self.location, self.manifest, self.companion)
        position, turn = self.position, 0
        for epoch in count(position.epoch):
            if self.epochs is not None and epoch >= self.position.epoch + self.epochs:
                return
            order = EpochOrder(sizes, self.seed, position)
            window: tuple[int, int] | None = None
            for number in range(order.first, order.batches):
                for part in range(self.parts):
                    if turn == worker:
                        if window != (window := self.readers.window_of(number, order.batches)):
                            reader.prefetch(*order.neighbourhood(self.rank, number))
                        yield self._read(reader, order, number, part)
                    turn = (turn + 1) % workers
            position = Position(epoch + 1).join(self.readers)

    def _read(self, reader: SampleReader, order: EpochOrder, number: int, part: int) -> StoredBatch:
        # The seed says where in the order the batch stands; the order itself draws from other streams.
        entropy = [self.seed, order.epoch, self.rank, number, order.part, 1]
        seeds = np.random.SeedSequence(entropy).generate_state(1 + part, np.uint64) >> np.uint64(1)
        size = self.readers.batch_size // self.parts
        rows = slice(part * size, (part + 1) * size)
        mirror = (np.random.default_rng(int(seeds[0])).random(self.readers.batch_size) < 0.5)[rows]
        shards, indices = (column[rows] for column in order.batch(self.rank, number))
        samples = reader.room(len(shards))
        for shard, index, hflip in zip(shards.tolist(), indices.tolist(), mirror.tolist(), strict=True):
            reader.read(shard, index, hflip, samples)
        following = number + 1
        while not samples.labels and following < order.batches:
            for shard, index in zip(*(places.tolist() for places in order.batch(self.rank, following)), strict=True):
                if not samples.labels:
                    reader.read(shard, index, False, samples)
            following += 1
        return samples.batch(int(seeds[part]))
