"""The order of samples: a pure function of seed, epoch, rank and world size, which can be entered anywhere.

In every epoch the shards are permuted by (seed, epoch) and laid end to end. The ranks take equal contiguous sections,
in whole batches; what does not fill one more batch for every rank, fewer samples than one global batch, is left out.
A rank shuffles its section in windows, by (seed, epoch, rank, window). Nothing depends on what was read before, so a
resumed run computes where it stands instead of reading up to there; nor on the number of reading processes.

Readers that change in the middle of an epoch (another world size, batch size or window) divide what their predecessors
left of it, and no sample is seen twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcdit.checks import Count, Natural
from dcdit.errors import UserError

Places = NDArray[np.int64]


def micro_batch(batch_size: int, processes: int, accumulate: int) -> int:
    """Samples of a process at once; :class:`UserError` unless ``batch_size`` can be split so."""
    size, rest = divmod(batch_size, processes * accumulate)
    if rest or not size:
        raise UserError(
            f"data.batch_size={batch_size} cannot be split over {processes} processes x"
            f" trainer.accumulate_grad_batches={accumulate}: take a multiple of {processes * accumulate}"
        )
    return size


@dataclass(frozen=True)
class Readers:
    """Who reads together.

    Attributes:
        world_size: number of ranks.
        batch_size: samples per batch of one rank: its share of an optimiser step, however it is split.
        window: samples shuffled together; below two batches nothing is shuffled within a shard.
    """

    world_size: Count
    batch_size: Count
    window: Natural

    @property
    def window_batches(self) -> int:
        """Batches per window: windows hold whole ones."""
        return max(1, self.window // self.batch_size)

    def batches(self, samples: int) -> int:
        """Batches that every rank gets out of ``samples``."""
        return samples // (self.world_size * self.batch_size)

    def window_of(self, batch: int, batches: int) -> tuple[int, int]:
        """First batch of the window that holds ``batch``, and the first one after it."""
        first = batch - batch % self.window_batches
        return first, min(first + self.window_batches, batches)


@dataclass(frozen=True)
class Position:
    """A place in the order.

    Attributes:
        epoch: counted from 0.
        done: readers of this epoch up to here, in order, each with the batches that every rank of theirs has taken.
    """

    epoch: Natural = 0
    done: tuple[tuple[Readers, Natural], ...] = ()

    @property
    def samples(self) -> int:
        """Samples of this epoch already seen, over all ranks."""
        return sum(batches * readers.world_size * readers.batch_size for readers, batches in self.done)

    def join(self, readers: Readers) -> "Position":
        """The same place, ``readers`` being the last in ``done``."""
        if self.done and self.done[-1][0] == readers:
            return self
        return replace(self, done=(*self.done, (readers, 0)))

    def advance(self, readers: Readers, batches: int, samples: int) -> "Position":
        """The place after every rank of ``readers`` has taken ``batches`` more, in epochs of ``samples``."""
        epoch, done = self.epoch, self.join(readers).done
        while True:
            taken = done[-1][1]
            before = Position(epoch, done[:-1]).samples
            room = readers.batches(samples - before) - taken
            if batches <= room:
                return Position(epoch, (*done[:-1], (readers, taken + batches)))
            batches -= room
            epoch, done = epoch + 1, ((readers, 0),)
            assert readers.batches(samples), "an epoch must hold a batch"


class EpochOrder:
    """The batches of one epoch for readers who enter it at a position.

    Args:
        sizes: samples of each shard.
        seed: of everything random.
        position: joined by the present readers.
    """

    def __init__(self, sizes: Sequence[int], seed: int, position: Position) -> None:
        self.seed, self.epoch = seed, position.epoch
        self.shards = np.random.default_rng([seed, self.epoch]).permutation(len(sizes))
        self._ends = np.cumsum(np.asarray(sizes, np.int64)[self.shards])
        self._starts = np.concatenate([[0], self._ends[:-1]])
        pool: range | Places = range(int(self._ends[-1]))
        for part, (readers, taken) in enumerate(position.done[:-1]):
            pool = self._rest(pool, part, readers, taken)
        self._pool = pool
        self.part = len(position.done) - 1
        self.readers, self.first = position.done[-1]
        self.batches = self.readers.batches(len(pool))
        """Batches of every rank in this part of the epoch, those before ``first`` included."""
        self._recent: tuple[tuple[int, int], Places] = ((-1, -1), np.empty(0, np.int64))

    def batch(self, rank: int, number: int) -> tuple[Places, Places]:
        """Where the samples of a rank's batch lie: shard numbers (B,) and places within them (B,)."""
        size = self.readers.batch_size
        first, end = self.readers.window_of(number, self.batches)
        if self._recent[0] != (rank, first):
            self._recent = (rank, first), self._window(self._pool, self.part, self.readers, rank, first, end)
        return self.locate(self._recent[1][(number - first) * size : (number - first + 1) * size])

    def neighbourhood(self, rank: int, number: int) -> tuple[list[int], list[int]]:
        """Numbers of the shards in the window that holds a batch, and in the window after it."""
        first, end = self.readers.window_of(number, self.batches)
        return self._shards_between(rank, first, end), self._shards_between(rank, end, end + end - first)

    def locate(self, places: Places) -> tuple[Places, Places]:
        """Shard numbers and places within them of ``places`` in the epoch."""
        which = np.searchsorted(self._ends, places, side="right")
        return self.shards[which], places - self._starts[which]

    def _shards_between(self, rank: int, first: int, end: int) -> list[int]:
        size = self.readers.batch_size
        offset = rank * self.batches
        part = self._pool[(offset + first) * size : (offset + min(end, self.batches)) * size]
        return np.unique(self.locate(np.asarray(part, np.int64))[0]).tolist() if len(part) else []

    def _window(self, pool: range | Places, part: int, readers: Readers, rank: int, first: int, end: int) -> Places:
        """Places of a rank's batches from ``first`` to ``end``, one window, in the order in which they are seen."""
        batches, size = readers.batches(len(pool)), readers.batch_size
        offset = rank * batches
        places = np.asarray(pool[(offset + first) * size : (offset + end) * size], np.int64)
        if readers.window_batches > 1:
            places = np.random.default_rng([self.seed, self.epoch, part, rank, first]).permutation(places)
        return places

    def _rest(self, pool: range | Places, part: int, readers: Readers, taken: int) -> Places:
        """What ``readers`` left of ``pool`` after each rank took ``taken`` batches."""
        batches, size = readers.batches(len(pool)), readers.batch_size
        left: list[Any] = []
        for rank in range(readers.world_size):
            begin = taken
            if taken < batches and taken % readers.window_batches:  # in the middle of a window
                first, end = readers.window_of(taken, batches)
                window = self._window(pool, part, readers, rank, first, end)
                left.append(np.sort(window[(taken - first) * size :]))
                begin = end
            left.append(pool[(rank * batches + begin) * size : (rank + 1) * batches * size])
        left.append(pool[readers.world_size * batches * size :])
        return np.concatenate([np.asarray(places, np.int64) for places in left])
