"""The LightningDataModule over latent shards."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from dcdit.data.manifest import MANIFEST_NAME, Manifest
from dcdit.data.sources import Source
from dcdit.data.stream import Batch, LatentStream, StreamConfig
from dcdit.errors import UserError


class LatentDataModule(pl.LightningDataModule):
    """Streams latent shards to any number of ranks, endlessly, in an order fixed by the seed.

    Lightning sees one endless epoch; the position in the data is saved with each checkpoint.

    Args:
        directory: holds ``train/`` and, if there is a validation split, ``val/``, each with a manifest.
        batch_size: samples per optimiser step over all ranks and micro-batches.
        num_workers: reading processes per rank; 0 reads in the training process.
        shuffle_buffer: samples held for shuffling per worker.
        seed: order of shards and samples.
        source: writes the shards if the training split has none yet; None expects them to be there.

    Raises:
        UserError: if a size is out of range.
    """

    def __init__(
        self,
        directory: str,
        batch_size: int = 256,
        num_workers: int = 4,
        shuffle_buffer: int = 10_000,
        seed: int = 0,
        source: Source | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("shuffle_buffer", shuffle_buffer, 0),
        ):
            if value < least:
                raise UserError(f"{name}={value} is below {least}")
        self.directory = Path(directory)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.source = source
        self.samples_seen = 0

    def prepare_data(self) -> None:
        """Have the source write the shards, unless they are there."""
        if self.source is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        # Several processes may start at once; one writes, the others wait and then find the shards.
        with FileLock(self.directory / ".lock"):
            if not (self.directory / "train" / MANIFEST_NAME).is_file():
                rank_zero_info(f"Writing shards to {self.directory}")
                self.source.write(self.directory)

    def manifest(self, split: str = "train") -> Manifest:
        """The checked manifest of a split; UserError if it is missing or does not match its shards."""
        return Manifest.read(self.directory / split)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless training batches, from where the last checkpoint stopped."""
        assert self.trainer is not None
        micro, rest = divmod(self.batch_size, self.trainer.world_size * self.trainer.accumulate_grad_batches)
        if rest or not micro:
            raise UserError(
                f"data.batch_size={self.batch_size} cannot be split over {self.trainer.world_size} processes x"
                f" trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}: take a multiple of"
                f" {self.trainer.world_size * self.trainer.accumulate_grad_batches}"
            )
        consumed = self.samples_seen // (micro * self.trainer.world_size)
        stream = LatentStream(self.directory / "train", self.manifest(), self._order(micro), start=consumed)
        # Too few shards: say so here rather than in a worker process.
        stream.deal(0, self.trainer.world_size * max(1, self.num_workers))
        return self._loader(stream)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One pass over the validation split in a fixed order; none if there is no such split."""
        assert self.trainer is not None
        if not (self.directory / "val" / MANIFEST_NAME).is_file():
            return []
        manifest = self.manifest("val")
        smallest = min(shard.samples for shard in manifest.shards)
        micro = max(1, min(self.batch_size // self.trainer.world_size, smallest))
        stream = LatentStream(self.directory / "val", manifest, self._order(micro, shuffle_buffer=0), epochs=1)
        return [DataLoader(stream, batch_size=None)]

    def _order(self, micro: int, shuffle_buffer: int | None = None) -> StreamConfig:
        assert self.trainer is not None
        buffer = self.shuffle_buffer if shuffle_buffer is None else shuffle_buffer
        return StreamConfig(micro, self.seed, buffer, self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, stream: LatentStream) -> DataLoader[Batch]:
        assert self.trainer is not None
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        workers = self.num_workers
        return DataLoader(
            stream, batch_size=None, num_workers=workers, pin_memory=on_gpu, persistent_workers=workers > 0
        )

    def state_dict(self) -> dict[str, Any]:
        """The position in the data: samples seen by all ranks."""
        assert self.trainer is not None
        return {"samples_seen": self.trainer.global_step * self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the samples already seen."""
        self.samples_seen = state_dict["samples_seen"]
