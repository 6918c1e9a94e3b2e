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
        self._work = directory / _WORK

    def open(self) -> Manifest | None:
        """Begin or continue.

        Returns:
            The manifest if everything is done.

        Raises:
            UserError: if the directory holds anything but this extraction.
        """
        with self._lock():
            path = self._work / "plan.json"
            if (self.directory / MANIFEST_NAME).is_file():
                manifest = Manifest.read(self.directory / MANIFEST_NAME)
                self._compare(manifest.extraction)
                return manifest
            if path.is_file():
                self._compare(json.loads(path.read_text()))
            elif any(self.directory.glob("*.tar")):
                raise UserError(f"out: {self.directory} holds tar files that no extraction wrote: choose another place")
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
            skipped = tuple(Skipped(**image) for record in records for image in record["skipped"])
            shards = tuple(Shard(**record["shard"]) for record in records if record["shard"])
            if shards:
                written = manifest(shards, skipped)
                written.write(self.directory)
            shutil.rmtree(self._work)
            if not shards:
                raise UserError(f"no image could be used; the first: {skipped[0].file}: {skipped[0].reason}")
            return written

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


def _write(path: Path, values: Mapping[str, Any]) -> None:
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(values))
    draft.replace(path)
