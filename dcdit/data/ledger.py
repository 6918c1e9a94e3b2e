"""What of an extraction is done: kept as files beside the shards, so that any process can see it at any moment."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from dcdit.data.manifest import MANIFEST_NAME, Manifest, Shard, Skipped
from dcdit.errors import UserError

_WORK = ".extraction"


class Ledger:
    """The plan of an extraction and a record of every finished unit, until the manifest takes their place.

    Args:
        directory: of the shards.
        plan: plain values that must be the same whenever the extraction is continued; ``source`` maps names to states.
        units: how many units there are.
    """

    def __init__(self, directory: Path, plan: Mapping[str, Any], units: int) -> None:
        self.directory, self.plan, self.units = directory, plan, units
        self.wrote = False
        """Whether this process finished the whole."""
        self._work = directory / _WORK

    def open(self) -> Manifest | None:
        """Begin or continue; where shards of a finished extraction are missing or cut short, they are to do again.

        Returns:
            The manifest if everything is done and there.

        Raises:
            UserError: if the directory holds anything but this extraction.
        """
        with self._lock():
            path = self._work / "plan.json"
            if (self.directory / MANIFEST_NAME).is_file():
                manifest = Manifest.read(self.directory / MANIFEST_NAME)
                self._compare(manifest.extraction)
                if all(self._is_whole(shard) for shard in manifest.shards):
                    return manifest
                self._reopen(manifest)
            if path.is_file():
                self._compare(json.loads(path.read_text()))
            elif any(self.directory.glob("*.tar")):
                raise UserError(
                    f"out: {self.directory} holds tar files without a manifest or a record of an extraction: choose"
                    " another place, or delete them"
                )
            else:
                self._work.mkdir(exist_ok=True)
                _write(path, self.plan)
        return None

    def is_done(self, unit: int) -> bool:
        """Whether a unit is finished."""
        return self._record(unit).is_file()

    def enter(self, unit: int, shard: Shard | None, skipped: Sequence[Skipped]) -> None:
        """Record a finished unit: its shard, unless all of it was skipped."""
        values = {"shard": asdict(shard) if shard else None, "skipped": [asdict(image) for image in skipped]}
        _write(self._record(unit), values)

    def close(self, manifest: Callable[[tuple[Shard, ...], tuple[Skipped, ...]], Manifest]) -> Manifest | None:
        """Write the manifest if all units of all processes are done; raises UserError if no image could be used."""
        with self._lock():
            if (self.directory / MANIFEST_NAME).is_file():  # another process was quicker
                return Manifest.read(self.directory / MANIFEST_NAME)
            if not all(self.is_done(unit) for unit in range(self.units)):
                return None
            records = [json.loads(self._record(unit).read_text()) for unit in range(self.units)]
            before = self._work / "skipped.json"
            known = json.loads(before.read_text()) if before.is_file() else []
            listed = [Skipped(**image) for image in [*known, *(i for record in records for i in record["skipped"])]]
            skipped = tuple(dict.fromkeys(listed))
            shards = tuple(Shard(**record["shard"]) for record in records if record["shard"])
            if shards:
                written = manifest(shards, skipped)
                written.write(self.directory)
                self.wrote = True
            shutil.rmtree(self._work)
            if not shards:
                raise UserError(f"no image could be used; the first: {skipped[0].file}: {skipped[0].reason}")
            return written

    def _is_whole(self, shard: Shard) -> bool:
        path = self.directory / shard.name
        return path.is_file() and path.stat().st_size == shard.bytes

    def _reopen(self, manifest: Manifest) -> None:
        """From a manifest back to records: all units are done but those whose shards are not whole."""
        shards = {shard.name: shard for shard in manifest.shards}
        self._work.mkdir(exist_ok=True)
        for unit in range(self.units):
            shard = shards.get(shard_name(unit))
            if shard is None or self._is_whole(shard):
                self.enter(unit, shard, [])
        _write(self._work / "skipped.json", [asdict(image) for image in manifest.skipped])
        _write(self._work / "plan.json", self.plan)
        (self.directory / MANIFEST_NAME).unlink()

    def _lock(self) -> FileLock:
        return FileLock(self.directory / ".extract.lock")

    def _record(self, unit: int) -> Path:
        return self._work / f"shard-{unit:06d}.json"

    def _compare(self, before: Mapping[str, Any]) -> None:
        """Raise UserError at the first difference between the plan and what was planned before."""
        remedy = f"continue with what was before, or choose another place than {self.directory}"
        if not before:
            raise UserError(f"out: {self.directory} holds shards that no extraction wrote: choose another place")
        had, has = before.get("source", {}), self.plan["source"]
        for name in sorted({*had, *has}):
            if had.get(name) != has.get(name):
                change = "is new" if name not in had else "is gone" if name not in has else "has changed"
                raise UserError(
                    f"source: {name!r} {change} since this extraction began"
                    f" ({had.get(name, 'not there')} before, {has.get(name, 'not there')} now): {remedy}"
                )
        for key, value in self.plan.items():
            if before.get(key) != value:
                raise UserError(f"{key}={value}, but the extraction there was begun with {before.get(key)}: {remedy}")


def shard_name(unit: int) -> str:
    """File name of the shard of a unit."""
    return f"shard-{unit:06d}.tar"


def _write(path: Path, values: Mapping[str, Any] | Sequence[Any]) -> None:
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(values))
    draft.replace(path)
