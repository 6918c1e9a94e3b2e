"""The LightningDataModule over latent shards."""

import logging
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os.path import normpath
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import torch
from filelock import FileLock
from torch.utils.data import DataLoader

from dcdit.checks import Count, Digest, Natural, Positive, Seed, Workers, checked, conform
from dcdit.data.builtin import build_source
from dcdit.data.decoder import network_latents
from dcdit.data.latents import IDENTITY, LatentScale, format_numbers
from dcdit.data.manifest import MANIFEST_NAME, Companion, Manifest
from dcdit.data.order import Position, Readers, micro_batch
from dcdit.data.splits import Validation, match_validation
from dcdit.data.storage import Location
from dcdit.data.stream import Batch, LatentStream, StoredBatch
from dcdit.errors import UserError
from dcdit.runtime.files import make_writable_folder
from dcdit.runtime.processes import say
from dcdit.runtime.signals import ignore_interrupts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamState:
    """A position in the data, as a checkpoint holds it.

    Attributes:
        place: the position at which reading goes on.
        step: the optimiser step that it belongs to.
        samples: number of samples of an epoch.
        order: of the shards, see :attr:`Manifest.order`.
    """

    place: Position
    step: Natural
    samples: Count
    order: Digest


@checked
class LatentDataModule(pl.LightningDataModule):
    """Streams latent shards to any number of ranks, endlessly, in an order fixed by the seed.

    Lightning sees one endless epoch; the position in the data is saved with each checkpoint. A run that is resumed by
    other readers (another number of processes, batch size or shuffle buffer) keeps epoch and sample count: they divide
    among themselves what is left of the epoch, and see none of its samples again.

    Args:
        directory: holds ``train/`` and, if there is a validation split, ``val/``, each with a manifest; need not be
            writable where the shards exist. Or its URL, see :class:`dcdit.data.storage.Location`.
        batch_size: samples per optimiser step over all ranks and micro-batches.
        num_workers: reading processes per rank; 0 reads in the training process. Does not change the order.
        shuffle_buffer: samples shuffled together; 0 shuffles shards only.
        source: what writes the shards if there are none yet, for :func:`dcdit.data.builtin.build_source`.
        autoencoder, scale: those that the shards must have been made with; None takes any.
        corrupt_limit: unreadable samples that each rank leaves out before training stops.
        cache, cache_gb, allow_pipe: for URLs.
        features: where training has features of an encoder from: ``stored`` beside the latents, or ``computed`` of
            pixels; None if it needs none.
    """

    def __init__(
        self,
        directory: str,
        batch_size: Count,
        num_workers: Workers,
        shuffle_buffer: Natural,
        seed: Seed,
        source: Mapping[str, Any] | None,
        autoencoder: str | None,
        scale: LatentScale | None,
        corrupt_limit: Natural,
        cache: str | None,
        cache_gb: Positive,
        allow_pipe: bool,
        features: Literal["computed", "stored"] | None,
    ) -> None:
        super().__init__()
        self.location = Location(directory, cache, cache_gb, allow_pipe)
        self.batch_size, self.num_workers, self.shuffle_buffer, self.seed = (
            batch_size,
            num_workers,
            shuffle_buffer,
            seed,
        )
        self.source = build_source(source) if source else None
        self.autoencoder, self.scale, self.corrupt_limit = autoencoder, scale, corrupt_limit
        self.features = features
        self.corrupt: set[tuple[str, int]] = set()
        self._reported: set[tuple[str, str]] = set()
        self._manifest: Manifest | None = None
        self._validation: Validation | None = None
        self._start, self._start_step = Position(), 0

    def prepare_data(self) -> None:
        """Have the source write the shards, unless they are there."""
        if self.source is None:
            return
        if self.location.remote:
            raise UserError(f"directory={self.location.root}: data.source writes to local directories only")
        directory = self.location.directory
        manifest = directory / "train" / MANIFEST_NAME  # which a source writes last
        if manifest.is_file():
            return  # from a directory that need not be writable
        make_writable_folder(directory, "data.directory")
        # Several processes may start at once; one writes, the others wait and then find the shards.
        with FileLock(directory / ".lock"):
            if not manifest.is_file():
                say(f"Writing shards to {directory}")
                self.source.write(directory)

    def manifest(self) -> Manifest:
        """The manifest of the training split.

        Raises:
            UserError: if it is missing, does not match its shards, or disagrees with ``autoencoder`` or ``scale``.
        """
        if self._manifest is None:
            manifest = self.location.below("train").manifest()
            if self.autoencoder is not None and normpath(self.autoencoder) != normpath(
                manifest.autoencoder
            ):  # ./folder is folder
                self._refuse("autoencoder", self.autoencoder, manifest.autoencoder, f"{manifest.autoencoder} or null")
            if self.scale not in (None, manifest.scale):
                wanted, made = format_numbers(self.scale), format_numbers(manifest.scale)
                self._refuse("scale", wanted, made, "null" if isinstance(manifest.scale, tuple) else f"{made} or null")
            self._manifest = manifest
            if warning := manifest.describe_unusual():
                say(warning)
        return self._manifest

    def _refuse(self, key: str, wanted: str, made: str, remedy: str) -> NoReturn:
        raise UserError(
            f"data.{key}={wanted}, but the shards in {self.location.root}/train were made with {made}: set"
            f" data.{key}={remedy}, or point data.directory at other shards"
        )

    def validation(self) -> Validation | None:
        """The validation split as the training split sees it; None if there is none.

        Raises:
            UserError: if what lies there cannot be used, or does not belong to the training split.
        """
        if self._validation is None:
            location = self.location.below("val")
            try:
                own = location.manifest_if_any()
                self._validation = match_validation(self.manifest(), own) if own else None
            except UserError as error:
                raise UserError(
                    f"validation split in {location.root}: {error}. To train without validation, move it away"
                ) from error
            if self._validation and self._validation.note:
                say(self._validation.note)
        return self._validation

    def companion(self) -> Companion | None:
        """The companion shards that training reads; None if it reads none.

        Raises:
            UserError: if the shards do not hold what alignment needs, or a companion shard is missing or cut short.
        """
        if self.features is None:
            return None
        manifest, location = self.manifest(), self.location.below("train")
        held = manifest.companion.kind if manifest.companion else None
        needed = "features" if self.features == "stored" else "pixels"
        if held == needed:
            location.check_shards(manifest.companion.shards if manifest.companion else ())
            return manifest.companion
        if needed == "pixels" and manifest.autoencoder == IDENTITY:
            return None  # the latents are the pixels
        other = "stored" if held == "features" else "computed"
        instead = f"set alignment.features={other}, or " if held else ""
        raise UserError(
            f"alignment.features={self.features} needs {needed} beside the latents, and {location.root} holds"
            f" {held or 'none'}: {instead}extract them with python -m dcdit.extract companion={needed} to another place"
        )

    def train_dataloader(self) -> DataLoader[StoredBatch]:
        """Endless training batches, from where the last checkpoint stopped."""
        assert self.trainer is not None
        manifest, readers = self.manifest(), self._readers()
        earlier = self._start.done[-1][0] if self._start.done else readers
        if earlier != readers:
            say(
                f"Resuming with {_describe_readers(readers)} instead of {_describe_readers(earlier)}: epoch"
                f" {self._start.epoch} goes on after {self._start.samples} of its {manifest.samples} samples, none of"
                " which is seen again; the order of the others is new."
            )
        location, parts = self.location.below("train"), self.trainer.accumulate_grad_batches
        return DataLoader(
            LatentStream(
                *(location, manifest, readers, self.trainer.global_rank, self.seed, self._start),
                parts=parts,
                companion=self.companion(),
            ),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_interrupts,
        )

    def val_dataloader(self) -> list[DataLoader[StoredBatch]]:
        """One pass over the validation split in a fixed order; none if there is no such split."""
        assert self.trainer is not None
        split = self.validation()
        if split is None:
            return []
        location, manifest, world = self.location.below("val"), split.manifest, self.trainer.world_size
        # Batches of one size, as large as those of training allow, that leave out as little as possible.
        share, largest = manifest.samples // world, self._readers().batch_size // self.trainer.accumulate_grad_batches
        if not share:
            raise UserError(
                f"the validation split in {location.root} has {manifest.samples} samples for {world} processes: add"
                " some, take fewer processes, or remove it"
            )
        readers = Readers(world, share // -(-share // largest), 0)
        stream = LatentStream(location, manifest, readers, self.trainer.global_rank, self.seed, epochs=1)
        return [DataLoader(stream, batch_size=None)]

    def on_after_batch_transfer(self, batch: StoredBatch, dataloader_idx: int) -> Batch:
        """Turn stored latents or moments into scaled latents, on the device, and report what could not be read.

        Raises:
            UserError: if more than ``corrupt_limit`` samples could not be read, or nothing can be any more.
        """
        for shard, index, reason in batch.corrupt:
            if (shard, reason) not in self._reported:  # a whole shard, gone or cut short, is one message
                self._reported.add((shard, reason))
                log.warning("left out: %s, sample %d: %s (%d so far)", shard, index, reason, len(self.corrupt) + 1)
            self.corrupt.add((shard, index))
        if len(self.corrupt) > self.corrupt_limit or not len(batch.labels):
            inspect = f"python -m dcdit.inspect_latents {shlex.quote(f'directory={self.location.root}')}"
            raise UserError(
                f"{len(self.corrupt)} samples in {self.location.root} could not be read (data.corrupt_limit="
                f"{self.corrupt_limit}); the last: {shard}, sample {index}: {reason}. Restore the shards ({inspect}"
                " lists what is wrong), or raise the limit, and resume with ckpt_path=last"
            )
        generator = torch.Generator(batch.stored.device).manual_seed(batch.seed)
        split = None if self.trainer is None or self.trainer.training else self.validation()
        if split is None:
            return Batch(network_latents(batch.stored, self.manifest(), generator), batch.labels, batch.companion)
        labels = torch.tensor(split.labels, device=batch.labels.device)[batch.labels]
        return Batch(network_latents(batch.stored, split.manifest, generator), labels)

    def _readers(self) -> Readers:
        """Who reads the training split together; UserError if the batch cannot be divided among them."""
        assert self.trainer is not None
        world, parts = self.trainer.world_size, self.trainer.accumulate_grad_batches
        return Readers(world, parts * micro_batch(self.batch_size, world, parts), self.shuffle_buffer)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and the optimiser step that it belongs to."""
        assert self.trainer is not None
        step, manifest = self.trainer.global_step, self.manifest()
        position = self._start.advance(self._readers(), step - self._start_step, manifest.samples)
        return asdict(StreamState(position, step, manifest.samples, manifest.order))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of a checkpoint."""
        state = conform("LatentDataModule", state_dict, StreamState)
        self._start, self._start_step = state.place, state.step


def _describe_readers(readers: Readers) -> str:
    return f"{readers.world_size} x {readers.batch_size} samples (shuffle buffer {readers.window})"
