"""What of a long job is done: kept as files beside the results, so that any process can see it at any moment."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from dcdit.errors import UserError
from dcdit.runtime.progress import Display


class Ledger:
    """The plan of a job in units and a record of every finished unit, until the job is concluded.

    Processes share nothing else; whichever finds all units done concludes.

    Args:
        directory: of the results, which exists.
        job: what the job is called in messages, and in the name of its folder of records.
        plan: plain values that must be the same whenever the job is continued; ``source``, if there is one, maps names
            to states.
        units: how many units there are.
    """

    def __init__(self, directory: Path, job: str, plan: Mapping[str, Any], units: int) -> None:
        self.directory, self.job, self.plan, self.units = directory, job, plan, units
        self.work = directory / f".{job}"
        self.concluded = False
        """Whether this process concluded the job."""

    def lock(self) -> FileLock:
        """Held while looking at the whole."""
        return FileLock(self.directory / f".{self.job.partition('-')[0]}.lock")

    def begin(self) -> None:
        """Write the plan, or compare it with the one that is there; call under the lock.

        Raises:
            UserError: naming the first difference.
        """
        path = self.work / "plan.json"
        if path.is_file():
            self.compare(json.loads(path.read_text()))
        else:
            self.work.mkdir(exist_ok=True)
            write_json(path, self.plan)

    def record(self, unit: int) -> Path:
        """File of a unit's record."""
        return self.work / f"unit-{unit:06d}.json"

    def is_done(self, unit: int) -> bool:
        """Whether a unit is finished."""
        return self.record(unit).is_file()

    def enter(self, unit: int, values: Mapping[str, Any]) -> None:
        """Record a finished unit with plain values."""
        write_json(self.record(unit), values)

    def conclude(self, result: Path, write: Callable[[list[dict[str, Any]]], None]) -> None:
        """If all units are done and ``result`` is not there yet, write it from the records and forget them."""
        with self.lock():
            if result.is_file() or not all(self.is_done(unit) for unit in range(self.units)):
                return
            write([json.loads(self.record(unit).read_text()) for unit in range(self.units)])
            shutil.rmtree(self.work)
            self.concluded = True

    def compare(self, before: Mapping[str, Any]) -> None:
        """Raise :class:`UserError` at the first difference between the plan and what was planned before."""
        remedy = f"continue with what was before, or choose another place than {self.directory}"
        had, has = before.get("source") or {}, self.plan.get("source") or {}
        for name in sorted({*had, *has}):
            if had.get(name) != has.get(name):
                change = "is new" if name not in had else "is gone" if name not in has else "has changed"
                raise UserError(
                    f"source: {name!r} {change} since this {self.job} began"
                    f" ({had.get(name, 'not there')} before, {has.get(name, 'not there')} now): {remedy}"
                )
        for key, value in self.plan.items():
            if before.get(key) != value:
                raise UserError(f"{key}={value}, but the {self.job} there was begun with {before.get(key)}: {remedy}")


class ImageJob(Ledger):
    """A job over numbered images, a unit of which is so many of them in a row.

    Args:
        directory, job, plan: see :class:`Ledger`.
        count: number of images.
        part: images of a unit; the last may have fewer.
    """

    def __init__(self, directory: Path, job: str, plan: Mapping[str, Any], count: int, part: int) -> None:
        super().__init__(directory, job, plan, -(-count // part))
        self.count, self.part = count, part

    def numbers(self, unit: int) -> range:
        """The images of a unit."""
        return range(unit * self.part, min((unit + 1) * self.part, self.count))

    def do(self, rank: int, world_size: int, unit: Callable[[int], None], display: Display) -> None:
        """Call ``unit`` for those of this process's units that are not done; it must :meth:`enter` each."""
        own = range(rank, self.units, world_size)
        left = [number for number in own if not self.is_done(number)]
        display.begin(len(own), len(own) - len(left), sum(len(self.numbers(number)) for number in left))
        for number in left:
            unit(number)
            display.shard(f"{display.verb}, part {number}", len(self.numbers(number)))


def write_json(path: Path, values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write plain values, all at once or not at all."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(values, indent=1) + "\n")
    draft.replace(path)
