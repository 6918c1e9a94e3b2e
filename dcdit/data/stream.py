"""Reading batches in the order of :mod:`dcdit.data.order`."""

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dcdit.data.manifest import Manifest
from dcdit.data.order import EpochOrder, Position, Readers
from dcdit.data.shards import CorruptSampleError, Layout
from dcdit.data.storage import Location, ShardReader
from dcdit.errors import UserError

Batch = tuple[Tensor, Tensor]
"""A batch for the network: latents (B, C, H, W) float32, scaled and shifted, and labels (B,) int64."""


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
    """

    stored: Tensor
    labels: Tensor
    seed: int
    corrupt: list[Corruption]


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
        self._layout = Layout.of(manifest)
        if not readers.batches(manifest.samples):
            raise UserError(
                f"data.batch_size={readers.world_size * readers.batch_size} exceeds the {manifest.samples} samples in"
                f" {location.root}: lower data.batch_size"
            )

    def __iter__(self) -> Iterator[StoredBatch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        sizes = [shard.samples for shard in self.manifest.shards]
        reader = ShardReader(self.location, self.manifest.shards)
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

    def _read(self, reader: ShardReader, order: EpochOrder, number: int, part: int) -> StoredBatch:
        corrupt: list[Corruption] = []
        # The seed says where in the order the batch stands; the order itself draws from other streams.
        entropy = [self.seed, order.epoch, self.rank, number, order.part, 1]
        seeds = np.random.SeedSequence(entropy).generate_state(1 + part, np.uint64) >> np.uint64(1)
        size = self.readers.batch_size // self.parts
        rows = slice(part * size, (part + 1) * size)
        mirror = (np.random.default_rng(int(seeds[0])).random(self.readers.batch_size) < 0.5)[rows]
        shards, indices = (column[rows] for column in order.batch(self.rank, number))
        arrays = np.empty((len(shards), self._layout.array_bytes), np.uint8)
        labels: list[int] = []
        for shard, index, hflip in zip(shards.tolist(), indices.tolist(), mirror.tolist(), strict=True):
            self._read_sample(reader, shard, index, hflip, arrays, labels, corrupt)
        following = number + 1
        while not labels and following < order.batches:
            for shard, index in zip(*(places.tolist() for places in order.batch(self.rank, following)), strict=True):
                if not labels:
                    self._read_sample(reader, shard, index, False, arrays, labels, corrupt)
            following += 1
        stored = arrays[: len(labels)].view(self._layout.dtype).reshape(-1, *self._layout.stored_shape)
        return StoredBatch(torch.from_numpy(stored), torch.tensor(labels), int(seeds[part]), corrupt)

    def _read_sample(
        self,
        reader: ShardReader,
        shard: int,
        index: int,
        hflip: bool,
        arrays: np.ndarray,
        labels: list[int],
        corrupt: list[Corruption],
    ) -> None:
        """Read a sample into the next free row; add it to ``corrupt`` if it cannot be read."""
        try:
            row = arrays[len(labels)]
            label = self._layout.read(reader.descriptor(shard), index, hflip and self.manifest.hflip, row)
            if not 0 <= label < len(self.manifest.classes):
                raise CorruptSampleError(f"label {label} is none of {len(self.manifest.classes)} classes")
            labels.append(label)
        except (CorruptSampleError, OSError) as error:
            corrupt.append(Corruption(self.manifest.shards[shard].name, index, str(error)))
