"""Resumable jobs: long work in tasks whose records are files, so that every process can see what is done.

A killed job goes on where it was. Any number of processes can share it; the one that finds all tasks done writes the
result. Extraction, generation, evaluation and the statistics of references are such jobs.
"""

import shutil
import zlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from filelock import FileLock

from dcdit.checks import Natural, conform
from dcdit.errors import UserError
from dcdit.runtime.display import Display
from dcdit.runtime.files import open_regular, read_json, replacing, write_json

Record = TypeVar("Record")
"""A dataclass of plain values that is recorded of a task."""


@dataclass(frozen=True)
class Part:
    """A file that a task leaves behind: its size and checksum."""

    bytes: Natural
    crc32: Natural

    @classmethod
    def of(cls, path: Path) -> "Part":
        """Measure the file at ``path``."""
        size, checksum = 0, 0
        with open_regular(path) as file:
            while chunk := file.read(1 << 22):
                size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
        return cls(size, checksum)


class ResumableJob(Generic[Record]):
    """A job in tasks: its fingerprint, and a record of every finished task until the job is finalized.

    Processes share nothing else. If a record cannot be read, or its part is not what it was, the task is done again.

    Args:
        kind: class of the records.
        directory: folder of the results, which exists.
        name: what the job is called in messages, and in the name of its folder of records.
        fingerprint: plain values that must be the same whenever the job is continued; ``source``, if there is one, maps
            names to states.
        tasks: number of tasks.
    """

    def __init__(
        self, kind: type[Record], directory: Path, name: str, fingerprint: Mapping[str, Any], tasks: int
    ) -> None:
        self.kind, self.directory, self.name, self.fingerprint, self.tasks = kind, directory, name, fingerprint, tasks
        self.work = directory / f".{name}"
        self.finalized = False
        """Whether this process finalized the job."""

    def lock(self) -> FileLock:
        """The lock to hold while looking at all tasks."""
        return FileLock(self.directory / f".{self.name.partition('-')[0]}.lock")

    def check_fingerprint(self) -> None:
        """Write the fingerprint, or :meth:`compare` it with the one that is there; call under the lock."""
        path = self.work / "plan.json"
        remedy = f"delete {self.work}, which begins the {self.name} anew"
        try:
            before = read_json(path, dict[str, Any], remedy)
        except FileNotFoundError:
            self.work.mkdir(exist_ok=True)
            write_json(path, self.fingerprint)
        else:
            self.compare(before)

    def record_path(self, task: int) -> Path:
        """The file of a task's record."""
        return self.work / f"task-{task:06d}.json"

    def part_path(self, task: int) -> Path | None:
        """The file that a task leaves behind; None if there is none to check."""
        return None

    def record(self, task: int, values: Record) -> None:
        """Record that a task is finished; its part must have been written."""
        part = self.part_path(task)
        values_of_part = asdict(Part.of(part)) if part else None
        write_json(self.record_path(task), {"part": values_of_part, "record": asdict(values)})  # type: ignore[call-overload]

    def is_done(self, task: int) -> bool:
        """Whether a task is recorded as finished."""
        return self.record_path(task).is_file()

    def read_record(self, task: int) -> Record:
        """The record of a finished task; raises UserError or FileNotFoundError if record or part is damaged or gone."""
        path, part, damage = self.record_path(task), self.part_path(task), "the same command makes it again"
        entry = read_json(path, _Entry, damage)
        if part and (not part.is_file() or Part.of(part) != entry.part):
            raise UserError(f"{part} is damaged: {damage}")
        return conform(f"{path}: record", entry.record, self.kind)

    def forget_damaged(self, task: int) -> bool:
        """Remove a damaged record; returns whether the task has to be done."""
        if not self.is_done(task):
            return True
        try:
            self.read_record(task)
            return False
        except (UserError, FileNotFoundError):
            self.record_path(task).unlink(missing_ok=True)
            return True

    def finalize(self, result: Path, write: Callable[[list[Record]], None]) -> None:
        """If all tasks are done and ``result`` is not there yet, write it from the records and forget them."""
        with self.lock():
            if result.is_file() or not all(self.is_done(task) for task in range(self.tasks)):
                return
            write([self.read_record(task) for task in range(self.tasks)])
            shutil.rmtree(self.work)
            self.finalized = True

    def compare(self, before: Mapping[str, Any]) -> None:
        """Raise :class:`UserError` at the first difference between the fingerprint and an earlier one."""
        remedy = f"continue with what was before, or choose another place than {self.directory}"
        had, has = before.get("source") or {}, self.fingerprint.get("source") or {}
        for name in sorted({*had, *has}):
            if had.get(name) != has.get(name):
                change = "is new" if name not in had else "is gone" if name not in has else "has changed"
                raise UserError(
                    f"source: {name!r} {change} since this {self.name} began"
                    f" ({had.get(name, 'not there')} before, {has.get(name, 'not there')} now): {remedy}"
                )
        for key in {**self.fingerprint, **before}:
            value = self.fingerprint.get(key)
            if key != "source" and before.get(key) != value:
                raise UserError(f"{key}={value}, but the {self.name} there was begun with {before.get(key)}: {remedy}")


@dataclass(frozen=True)
class _Entry:
    """The content of a record's file."""

    part: Part | None
    record: dict[str, Any]


class ImageJob(ResumableJob[Record]):
    """A job over numbered images; each task is a chunk of consecutive ones.

    Several processes may do the same tasks, such as a command that was given twice: the first to finish a task records
    it.

    Args:
        kind, name, fingerprint: see :class:`ResumableJob`.
        result: file in which it ends.
        count: number of images.
        chunk_size: images of a task; the last may have fewer.
    """

    def __init__(
        self, kind: type[Record], result: Path, name: str, fingerprint: Mapping[str, Any], count: int, chunk_size: int
    ) -> None:
        super().__init__(kind, result.parent, name, fingerprint, -(-count // chunk_size))
        self.result, self.count, self.chunk_size = result, count, chunk_size

    @abstractmethod
    def part_path(self, task: int) -> Path:
        """The file that a task leaves behind."""

    def numbers(self, task: int) -> range:
        """The numbers of a task's images."""
        return range(task * self.chunk_size, min((task + 1) * self.chunk_size, self.count))

    def do(self, rank: int, world_size: int, work: Callable[[int], None], display: Display) -> None:
        """Call ``work`` for each task of this process that is not done; ``work`` must :meth:`finish` the task."""
        own, left = range(rank, self.tasks, world_size), []
        for number in own:
            with self.lock():
                if not self.result.is_file() and self.forget_damaged(number):
                    left.append(number)
        display.start(len(own), len(own) - len(left), sum(len(self.numbers(number)) for number in left))
        for number in left:
            if not self.result.is_file() and not self.is_done(number):
                work(number)
            display.finish(f"{display.verb}, chunk {number}", len(self.numbers(number)))

    def finish(self, task: int, values: Record, write: Callable[[BinaryIO], None]) -> None:
        """Write and record what a task leaves behind, unless another process has done so or has ended the job."""
        with self.lock():
            if not self.result.is_file() and not self.is_done(task):
                with replacing(self.part_path(task)) as file:
                    write(file)
                self.record(task, values)
