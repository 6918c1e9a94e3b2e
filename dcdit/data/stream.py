"""The order in which latents are seen: a pure function of (seed, epoch, rank, world size, workers)."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dcdit.data.manifest import Manifest, Shard
from dcdit.data.shards import decode, read_raw
from dcdit.errors import UserError

Batch = tuple[Tensor, Tensor]
"""Latents (B, C, H, W) float32, scaled and shifted for the network, and labels (B,) int64."""


@dataclass(frozen=True)
class StreamConfig:
    """Who reads what.

    Attributes:
        batch_size: samples per batch of one rank.
        seed: shuffles shards and samples.
        shuffle_buffer: samples held for shuffling within a shard list; 0 keeps stored order.
        rank, world_size: this process among all.
    """

    batch_size: int
    seed: int
    shuffle_buffer: int
    rank: int = 0
    world_size: int = 1


class LatentStream(IterableDataset[Batch]):
    """Endless batches, epoch after epoch, resumable at any batch.

    Shards are permuted by (seed, epoch) and dealt to ``world_size * workers`` slots; in every epoch each slot yields
    the same number of batches, the one that the poorest slot can fill, so that no rank waits for another.

    Args:
        directory, manifest: the shards.
        config: the order.
        start: batches of this rank already consumed.
        epochs: how many epochs to yield; None never ends.

    Raises:
        UserError: while iterating, if there are too few shards for the readers or a sample is damaged.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, config: StreamConfig, start: int = 0, epochs: int | None = None
    ) -> None:
        super().__init__()
        self.directory = directory
        self.manifest = manifest
        self.config = config
        self.start = start
        self.epochs = epochs

    def deal(self, epoch: int, slots: int) -> tuple[list[list[Shard]], int]:
        """The shards of every slot in ``epoch``, and the number of batches that each slot yields.

        Raises:
            UserError: if a slot cannot fill a single batch.
        """
        shards = self.manifest.shards
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(shards))
        dealt = [[shards[i] for i in order[slot::slots]] for slot in range(slots)]
        poorest = min(sum(shard.samples for shard in own) for own in dealt)
        batches = poorest // self.config.batch_size
        if batches == 0:
            raise UserError(
                f"data: {len(shards)} shards with {self.manifest.samples} samples in {self.directory} cannot give each"
                f" of {self.config.world_size} ranks x {slots // self.config.world_size} workers one batch of"
                f" {self.config.batch_size}: lower data.batch_size or data.num_workers, or write smaller shards"
            )
        return dealt, batches

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # The loader asks its workers in turn from worker 0 on; after a resume at batch k the turn is worker k % n's.
        worker = (worker + self.start) % workers
        skip = -((worker - self.start) // workers)  # batches of this worker among the first `start`
        slots, slot = self.config.world_size * workers, self.config.rank * workers + worker
        epochs = count() if self.epochs is None else range(self.epochs)
        for epoch in epochs:
            dealt, batches = self.deal(epoch, slots)
            if skip >= batches:
                skip -= batches
                continue
            yield from islice(self._epoch(epoch, slot, dealt[slot], skip), batches - skip)
            skip = 0

    def _epoch(self, epoch: int, slot: int, shards: list[Shard], skip: int) -> Iterator[Batch]:
        raw = read_raw(self.directory / shard.name for shard in shards)
        if self.config.shuffle_buffer:
            rng = random.Random(f"{self.config.seed}-{epoch}-{slot}")  # noqa: S311  (not for secrets)
            size = self.config.shuffle_buffer
            raw = wds.filters._shuffle(raw, bufsize=size, initial=size, rng=rng)
        samples = map(decode, islice(raw, skip * self.config.batch_size, None))
        while rows := list(islice(samples, self.config.batch_size)):
            latents = torch.from_numpy(np.stack([row.latent for row in rows]).astype(np.float32))
            labels = torch.tensor([row.label for row in rows])
            yield (latents - self.manifest.shift) * self.manifest.scale, labels
