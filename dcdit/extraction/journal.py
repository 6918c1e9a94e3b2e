"""The journal of an extraction: records become a manifest, and a manifest becomes records where shards are lost."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from typing_extensions import override

from dcdit.data.manifest import MANIFEST_NAME, Manifest, Shard, Skipped
from dcdit.data.shards import Layout, read_samples
from dcdit.data.statistics import Sums, Tally
from dcdit.errors import UserError
from dcdit.runtime.files import read_json, write_json
from dcdit.runtime.jobs import ResumableJob


@dataclass(frozen=True)
class Encoded:
    """The record of a finished task.

    Attributes:
        shard, sums: its shard, and sums over it; None if all was skipped.
        skipped: the images that are not in it.
        labels: labels of those that are; None if unknown.
        companion: its companion shard; None if it has none.
    """

    shard: Shard | None
    skipped: list[Skipped]
    sums: Sums | None
    labels: list[int] | None
    companion: Shard | None = None

    @property
    def shards(self) -> list[Shard]:
        """The files that the task has written: latents, and companions if there are any."""
        return [shard for shard in (self.shard, self.companion) if shard is not None]


MakeManifest = Callable[[tuple[Shard, ...], tuple[Shard, ...], tuple[Skipped, ...], Sums], Manifest]
"""From shards, their companions, skipped images and sums to the manifest."""


class ExtractionJob(ResumableJob[Encoded]):
    """A resumable job each of whose tasks writes one shard; ``tally`` makes an empty tally for one."""

    def __init__(
        self, directory: Path, plan: Mapping[str, object], tasks: int, layout: Layout, tally: Callable[[], Tally]
    ) -> None:
        super().__init__(Encoded, directory, "extraction", plan, tasks)
        self.layout, self.tally = layout, tally
        self.labels: set[int] | None = None
        """Labels of the images in all shards; None unless this process finalized the job and knows."""

    def open(self) -> Manifest | None:
        """Begin or continue; returns the manifest if everything is done and there.

        Where shards of a finished extraction are missing or cut short, their tasks are to be done again.

        Raises:
            UserError: if the directory holds anything but this extraction.
        """
        with self.lock():
            if (self.directory / MANIFEST_NAME).is_file():
                manifest = Manifest.read(self.directory / MANIFEST_NAME)
                if not manifest.extraction:
                    raise UserError(
                        f"out: {self.directory} holds shards that no extraction wrote: choose another place"
                    )
                self._check_normalise(manifest)
                self.compare(manifest.extraction)
                companions = manifest.companion.shards if manifest.companion else ()
                if all(self._is_whole(shard) for shard in (*manifest.shards, *companions)):
                    return manifest
                self._reopen(manifest)
            elif not self.work.is_dir() and any(self.directory.glob("*.tar")):
                raise UserError(
                    f"out: {self.directory} holds tar files without a manifest or a record of an extraction: choose"
                    " another place, or delete them"
                )
            self.check_fingerprint()
        return None

    def _check_normalise(self, manifest: Manifest) -> None:
        """Raise :class:`UserError` if a finished extraction is asked for with another ``normalise``."""
        asked, had = self.fingerprint.get("normalise"), manifest.extraction.get("normalise")
        if asked != had:
            raise UserError(
                f"normalise={asked}, but the extraction there was finished with {had}. The shards need not be written"
                f" again: source=null normalise={asked} changes scale and shift in {self.directory / MANIFEST_NAME}"
            )

    @override
    def read_record(self, task: int) -> Encoded:
        record = super().read_record(task)
        for shard in record.shards:
            if not self._is_whole(shard):  # gone or cut short is damage too
                raise UserError(f"{self.directory / shard.name} is damaged: the same command makes it again")
        return record

    def close(self, manifest: MakeManifest) -> Manifest | None:
        """Write the manifest if all tasks of all processes are done; returns it if it is there now.

        Raises:
            UserError: if no image could be used.
        """

        def write(records: list[Encoded]) -> None:
            skipped = [image for record in records for image in record.skipped]
            with suppress(FileNotFoundError):
                remedy = f"delete {self.work}, which begins the extraction anew"
                skipped = read_json(self.work / "skipped.json", list[Skipped], remedy) + skipped
            shards = tuple(record.shard for record in records if record.shard)
            companions = tuple(record.companion for record in records if record.companion)
            labels = [record.labels for record in records]
            self.labels = None if None in labels else {label for part in labels for label in part or ()}
            if not shards:
                shutil.rmtree(self.work)  # with another source, the same command begins anew
                first = f"; the first: {skipped[0].file}: {skipped[0].reason}" if skipped else ""
                raise UserError(f"no image could be used{first}")
            sums = Sums.total([record.sums for record in records if record.sums])
            manifest(shards, companions, tuple(dict.fromkeys(skipped)), sums).write(self.directory)

        path = self.directory / MANIFEST_NAME
        self.finalize(path, write)
        return Manifest.read(path) if path.is_file() else None

    def _is_whole(self, shard: Shard) -> bool:
        path = self.directory / shard.name
        return path.is_file() and path.stat().st_size == shard.bytes

    def _reopen(self, manifest: Manifest) -> None:
        """From a manifest back to records: all tasks are done but those whose shards are not whole."""
        shards = {shard.name: shard for shard in manifest.shards}
        companions = dict(zip(shards, manifest.companion.shards, strict=True)) if manifest.companion else {}
        self.work.mkdir(exist_ok=True)
        for task in range(self.tasks):
            shard, companion = shards.get(shard_name(task)), companions.get(shard_name(task))
            if shard is None:
                self.record(task, Encoded(None, [], None, []))
            elif self._is_whole(shard) and (companion is None or self._is_whole(companion)):
                tally, faults = self.tally(), list[str]()
                for _, _, array in read_samples(self.directory / shard.name, shard, self.layout, faults):
                    tally.add(array)
                if not faults:  # else the shard is done anew
                    self.record(task, Encoded(shard, [], tally.sums, None, companion))
        write_json(self.work / "skipped.json", [asdict(image) for image in manifest.skipped])
        write_json(self.work / "plan.json", self.fingerprint)
        (self.directory / MANIFEST_NAME).unlink()


def shard_name(task: int) -> str:
    """The file name of the shard that a task writes."""
    return f"shard-{task:06d}.tar"
