"""Resumable jobs: long work in tasks whose records are files, so that any process can see at any moment what is done.

A killed job goes on where it was, any number of processes shares it, and whichever finds all tasks done writes the
result. Extraction, generation, evaluation and the statistics of references are such jobs.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from dcdit.errors import UserError
from dcdit.runtime.display import Display
from dcdit.runtime.files import write_json


class ResumableJob:
    """The plan of a job in tasks and a record of every finished task, until the job is finalized.

    Processes share nothing else.

    Args:
        directory: of the results, which exists.
        name: what the job is called in messages, and in the name of its folder of records.
        plan: plain values that must be the same whenever the job is continued; ``source``, if there is one, maps names
            to states.
        tasks: how many tasks there are.
    """

    def __init__(self, directory: Path, name: str, plan: Mapping[str, Any], tasks: int) -> None:
        self.directory, self.name, self.plan, self.tasks = directory, name, plan, tasks
        self.work = directory / f".{name}"
        self.finalized = False
        """Whether this process finalized the job."""

    def lock(self) -> FileLock:
        """Held while looking at the whole."""
        return FileLock(self.directory / f".{self.name.partition('-')[0]}.lock")

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

    def record_path(self, task: int) -> Path:
        """File of a task's record."""
        return self.work / f"task-{task:06d}.json"

    def is_done(self, task: int) -> bool:
        """Whether a task is finished."""
        return self.record_path(task).is_file()

    def record(self, task: int, values: Mapping[str, Any]) -> None:
        """Record a finished task with plain values."""
        write_json(self.record_path(task), values)

    def finalize(self, result: Path, write: Callable[[list[dict[str, Any]]], None]) -> None:
        """If all tasks are done and ``result`` is not there yet, write it from the records and forget them."""
        with self.lock():
            if result.is_file() or not all(self.is_done(task) for task in range(self.tasks)):
                return
            write([json.loads(self.record_path(task).read_text()) for task in range(self.tasks)])
            shutil.rmtree(self.work)
            self.finalized = True

    def compare(self, before: Mapping[str, Any]) -> None:
        """Raise :class:`UserError` at the first difference between the plan and what was planned before."""
        remedy = f"continue with what was before, or choose another place than {self.directory}"
        had, has = before.get("source") or {}, self.plan.get("source") or {}
        for name in sorted({*had, *has}):
            if had.get(name) != has.get(name):
                change = "is new" if name not in had else "is gone" if name not in has else "has changed"
                raise UserError(
                    f"source: {name!r} {change} since this {self.name} began"
                    f" ({had.get(name, 'not there')} before, {has.get(name, 'not there')} now): {remedy}"
                )
        for key, value in self.plan.items():
            if before.get(key) != value:
                raise UserError(f"{key}={value}, but the {self.name} there was begun with {before.get(key)}: {remedy}")


class ImageJob(ResumableJob):
    """A job over numbered images, a task of which is a chunk of so many of them in a row.

    Args:
        directory, name, plan: see :class:`ResumableJob`.
        count: number of images.
        chunk_size: images of a task; the last may have fewer.
    """

    def __init__(self, directory: Path, name: str, plan: Mapping[str, Any], count: int, chunk_size: int) -> None:
        super().__init__(directory, name, plan, -(-count // chunk_size))
        self.count, self.chunk_size = count, chunk_size

    def numbers(self, task: int) -> range:
        """The images of a task."""
        return range(task * self.chunk_size, min((task + 1) * self.chunk_size, self.count))

    def do(self, rank: int, world_size: int, work: Callable[[int], None], display: Display) -> None:
        """Call ``work`` for those of this process's tasks that are not done; it must :meth:`record` each."""
        own = range(rank, self.tasks, world_size)
        left = [number for number in own if not self.is_done(number)]
        display.begin(len(own), len(own) - len(left), sum(len(self.numbers(number)) for number in left))
        for number in left:
            work(number)
            display.finish(f"{display.verb}, chunk {number}", len(self.numbers(number)))
