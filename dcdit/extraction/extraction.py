"""From images to latent shards, restartable at any moment, on any number of processes.

Every task of the source becomes one shard, and nothing in it depends on which process writes it or on what was written
before. Processes share nothing but the directory.
"""

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, groupby
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from rich.filesize import decimal
from torch.utils.data import DataLoader

from dcdit.checkpoints.encoder import Encoder
from dcdit.data.autoencoder import Autoencoder
from dcdit.data.companions import encode_features, write_with_companion
from dcdit.data.latents import check_numbers
from dcdit.data.manifest import MOMENTS, SAMPLE, Companion, Manifest, Representation, Shard, Skipped
from dcdit.data.shards import Layout, Sample
from dcdit.data.statistics import Sums, Tally
from dcdit.errors import UserError
from dcdit.extraction.decode import Decoded, ImageBatches, as_it_is
from dcdit.extraction.encoding import EncodedBatch, Encoding, Launched
from dcdit.extraction.journal import Encoded, ExtractionJob, shard_name
from dcdit.extraction.settings import ExtractionSettings
from dcdit.extraction.sources import ImageSource
from dcdit.runtime.devices import threads
from dcdit.runtime.display import Display
from dcdit.runtime.files import content_digest
from dcdit.runtime.signals import ignore_interrupts

_OF_FEATURES = ("encoder", "encoder_grid")
_OF_COMPANIONS = ("companion", "jpeg_quality", *_OF_FEATURES)
"""Settings of what is written beside the latents."""

_NEVER_FINITE = 16
"""Images after which an autoencoder that never gave a finite latent is given up."""


class Extraction:
    """The share of one process in an extraction.

    Args:
        directory: receives shards and manifest.
        source: the images.
        autoencoder: on the device that encodes.
        settings: of the shards, in which ``auto`` stands nowhere any more.
        rank, world_size: this process among all.
        workers: processes that decode images.
        strict: stop at the first image that cannot be used.
        corrupt_limit: images that this process skips before it stops.
        encoder: whose features are written beside the latents; None writes none.
        train: manifest of the train split whose scale and shift hold for this split too; None if it has its own.

    Raises:
        UserError: if settings do not fit together, or not to ``train``.
    """

    def __init__(
        self,
        directory: Path,
        source: ImageSource,
        autoencoder: Autoencoder,
        settings: ExtractionSettings,
        rank: int,
        world_size: int,
        workers: int,
        strict: bool,
        corrupt_limit: int,
        encoder: Encoder | None,
        train: Manifest | None,
    ) -> None:
        self.directory, self.source, self.autoencoder, self.settings = directory, source, autoencoder, settings
        self.rank, self.world_size, self.workers, self.strict = rank, world_size, workers, strict
        if autoencoder.image_size not in (None, settings.image_size):
            raise UserError(
                f"image_size={settings.image_size}: autoencoder={autoencoder.name!r} takes images of one size, set"
                f" image_size={autoencoder.image_size}"
            )
        side, rest = divmod(settings.image_size, autoencoder.factor)
        if rest:
            raise UserError(
                f"image_size={settings.image_size} is no multiple of {autoencoder.factor}, which"
                f" autoencoder={autoencoder.name!r} needs"
            )
        self.representation: Representation = MOMENTS if settings.representation == MOMENTS else SAMPLE
        self.latent_shape = (autoencoder.channels, side, side)
        stored_channels = autoencoder.channels * (2 if self.representation == MOMENTS else 1)
        self.layout = Layout((stored_channels, side, side), settings.dtype, settings.hflip)
        for key, values in (("scale", autoencoder.scale), ("shift", autoencoder.shift)):
            check_numbers(f"autoencoder={autoencoder.name!r}: its {key}", values, self.latent_shape)
        self.train, self.encoder = train, encoder
        self.encoding = Encoding(autoencoder, encoder, settings)
        self.corrupt_limit, self._corrupt, self._not_finite, self._any_finite = corrupt_limit, 0, 0, False
        made_by = {"autoencoder": autoencoder.fingerprint or autoencoder.name}
        plan = {**asdict(settings), **made_by, "source": source.inventory}
        # What is not written is no part of the plan, as it was before there was anything to write.
        left_out = {None: _OF_COMPANIONS, "pixels": _OF_FEATURES, "features": ("jpeg_quality",)}
        plan = {key: value for key, value in plan.items() if key not in left_out[settings.companion]}
        if encoder:
            plan["encoder"] = asdict(encoder.identity)
        if train:
            self._check_train(train)
            plan["train"] = train_digest(train)
        self.job = ExtractionJob(directory, plan, source.tasks, self.layout, self._tally)
        if strict and source.skipped:
            raise UserError(f"strict=true: {source.skipped[0].file}: {source.skipped[0].reason}")

    def run(self, display: Display) -> Manifest | None:
        """Encode what is not done yet of this process's share; returns the manifest if all processes are done.

        Raises:
            UserError: if the directory holds something else, the disk is too small, or, with ``strict``, for the first
                image that cannot be used.
        """
        lock = FileLock(self.directory / f".extraction-{self.rank}.lock")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:  # an OSError too
            several = f" as process {self.rank} of several" if self.world_size > 1 else ""
            raise UserError(
                f"out: another command is extracting to {self.directory}{several}: wait for it, or stop it"
            ) from None
        except OSError as error:
            raise UserError(f"out: {self.directory} cannot be written to: {error.strerror or error}") from error
        try:
            with threads(self.settings.threads):
                return self._run(display)
        finally:
            lock.release()

    def _run(self, display: Display) -> Manifest | None:
        if finished := self.job.open():
            return finished
        own = range(self.rank, self.source.tasks, self.world_size)
        tasks = [task for task in own if self.job.forget_damaged(task)]
        sizes = [self.source.size(task) for task in tasks]
        images = None if None in sizes else sum(size or 0 for size in sizes)
        self._check_disk(images or 0)
        display.start(len(own), len(own) - len(tasks), images)
        stream = self._encoded(tasks, display)
        for task, batches in groupby(stream, key=lambda batch: batch[0].task):
            name = shard_name(task)
            skipped: list[Skipped] = []
            labels: set[int] = set()
            tally = self._tally()
            samples = self._samples(batches, skipped, labels)
            shard, companion = write_with_companion(
                self.directory / name, samples, self.layout, tally, self.settings.companion
            )
            self.job.record(task, Encoded(shard, skipped, tally.sums if shard else None, sorted(labels), companion))
            display.finish(name, shard.samples if shard else 0)
        return self.job.close(self._manifest)

    def _tally(self) -> Tally:
        return Tally(self.latent_shape, self.representation, by_element=self.settings.normalise == "element")

    def _companion(self, shards: tuple[Shard, ...]) -> Companion | None:
        """The entry of companion ``shards`` in the manifest; None if nothing is written beside the latents."""
        if self.settings.companion is None:
            return None
        if self.encoder is None:
            return Companion("pixels", (3, self.settings.image_size, self.settings.image_size), shards, None)
        grid = self.encoder.grid
        return Companion("features", (self.encoder.channels, grid, grid), shards, self.encoder.identity)

    def _manifest(
        self, shards: tuple[Shard, ...], companions: tuple[Shard, ...], skipped: tuple[Skipped, ...], sums: Sums
    ) -> Manifest:
        scale, shift = self.autoencoder.scale, self.autoencoder.shift
        if self.train:
            scale, shift = self.train.scale, self.train.shift
        elif self.settings.normalise != "autoencoder":
            scale, shift = sums.normalisation(self.latent_shape)
        return Manifest(
            latent_shape=self.latent_shape,
            dtype=self.settings.dtype,
            representation=self.representation,
            hflip=self.settings.hflip,
            autoencoder=self.autoencoder.name,
            scale=scale,
            shift=shift,
            classes=self.source.classes,
            shards=shards,
            statistics=sums.statistics(self.autoencoder.channels),
            normalise="train" if self.train else self.settings.normalise,
            fingerprint=self.autoencoder.fingerprint,
            skipped=tuple(dict.fromkeys((*self.source.skipped, *skipped))),
            extraction=self.job.fingerprint,
            companion=self._companion(companions),
        )

    def _check_train(self, train: Manifest) -> None:
        """Raise :class:`UserError` unless latents of this split are of the kind of those of ``train``."""
        name, fingerprint = self.autoencoder.name, self.autoencoder.fingerprint
        own = replace(train.spec, shape=self.latent_shape, autoencoder=name, fingerprint=fingerprint)
        if difference := train.spec.difference_in_encoding(own):
            raise UserError(
                f"split={self.directory.name} must agree with {self.directory.parent / 'train'}: {difference}. Give"
                " image_size and autoencoder of train"
            )

    def empty_classes(self) -> list[str]:
        """Classes of which no image is in the shards, if this process finalized the extraction and knows."""
        labels, classes = self.job.labels, self.source.classes
        return [] if labels is None else [name for label, name in enumerate(classes) if label not in labels]

    def _check_disk(self, images: int) -> None:
        sample_bytes, features = self.layout.sample_bytes, self._companion(())
        if features and self.encoder:
            sample_bytes += math.prod(features.shape) * 2 * (1 + self.settings.hflip)
        needed, free = images * sample_bytes, shutil.disk_usage(self.directory).free
        if needed > free:
            raise UserError(
                f"{self.directory}: {decimal(needed)} are needed for {images} images, {decimal(free)} are free"
            )

    def _encoded(self, tasks: list[int], display: Display) -> Iterator[EncodedBatch]:
        """Decoded batches with their latents; a GPU works on the next batch while this one is written."""
        if not tasks:
            return
        loader = DataLoader(
            ImageBatches(self.source, tasks, self.settings),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            collate_fn=as_it_is,
            worker_init_fn=ignore_interrupts,
        )
        waiting: tuple[Decoded, Launched] | None = None
        for batch in chain(loader, [None]):
            if batch and batch.problem:
                raise UserError(batch.problem)
            launched = (batch, self.encoding.launch(batch.images, self.settings.precision)) if batch else None
            if waiting:
                yield self.encoding.collect(*waiting)
                display.advance(waiting[0].files)
            waiting = launched

    def _count_corrupt(self, skipped: Sequence[Skipped], hint: str = "") -> None:
        """Count images that cannot be used; UserError for the first with ``strict``, else beyond ``corrupt_limit``."""
        if self.strict and skipped:
            raise UserError(f"strict=true: {skipped[0].file}: {skipped[0].reason}{hint}")
        self._corrupt += len(skipped)
        if self._corrupt > self.corrupt_limit:
            raise UserError(
                f"{self._corrupt} images could not be used (corrupt_limit={self.corrupt_limit}); the last:"
                f" {skipped[-1].file}: {skipped[-1].reason}. Look at the source, or raise the limit; finished shards"
                " are kept"
            )

    def _samples(self, batches: Iterable[EncodedBatch], skipped: list[Skipped], labels: set[int]) -> Iterator[Sample]:
        """Samples of one shard; what must be left out is added to ``skipped``, labels of what is not to ``labels``."""
        for batch, latents, features in batches:
            skipped += [*batch.skipped, *batch.notes]
            self._count_corrupt(batch.skipped)
            for row, (number, item) in enumerate(batch.items.items()):
                views, seen = [array[row] for array in latents], [array[row] for array in features]
                fault = (
                    "" if all(np.isfinite(array).all() for array in seen) else "its features are not finite in float16"
                )
                if all(np.isfinite(array).all() for array in views) and not fault:
                    self._any_finite = True
                    labels.add(item.label)
                    latent, hflip = views if self.layout.hflip else (views[0], None)
                    companion = encode_features(seen) if seen else batch.jpegs[row] if batch.jpegs else {}
                    key = f"{batch.task:06d}-{number:06d}"
                    yield Sample(key, item.label, latent, hflip, item.source, companion)
                else:
                    skipped.append(Skipped(item.source, fault or f"its latent is not finite in {self.settings.dtype}"))
                    self._count_corrupt(skipped[-1:], "" if fault else ", try dtype=float32")
                    self._count_not_finite(item.source)

    def _count_not_finite(self, source: str) -> None:
        """Count an image whose latent is not finite; UserError if none of the first images has a finite one."""
        self._not_finite += 1
        if not self._any_finite and self._not_finite == _NEVER_FINITE:
            raise UserError(
                f"autoencoder={self.autoencoder.name!r}: the first {_NEVER_FINITE} images, {source} among them, became"
                f" latents that are not finite in {self.settings.dtype}: try precision=fp32 and dtype=float32, or"
                " another autoencoder"
            )


def train_digest(train: Manifest) -> str:
    """What the record of another split's extraction holds of the train split."""
    return content_digest({"classes": train.classes, "scale": train.scale, "shift": train.shift})[:16]
