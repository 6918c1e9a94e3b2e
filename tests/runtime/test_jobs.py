"""Resumable jobs: whatever is killed whenever, on any number of processes, the result is that of an undisturbed run."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdit.errors import UserError
from dcdit.runtime.display import Display, resumable
from dcdit.runtime.jobs import ImageJob


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


class Killed(BaseException):
    """Not even ``except Exception`` sees it, as with SIGKILL."""


MOMENTS = ("before", "half written", "unrecorded", "recorded")
"""When a process may die within a task."""


@dataclass(frozen=True)
class First:
    """What is recorded of a task."""

    first: int


class Squares(ImageJob[First]):
    at: Callable[[str], None]

    def part_path(self, task: int) -> Path:
        return self.work / f"chunk-{task}.json"

    def record(self, task: int, values: First) -> None:
        self.at("unrecorded")
        super().record(task, values)


class Process:
    """One process of a job whose tasks write the squares of their numbers, and whose result joins them.

    Args:
        folder: of the job.
        count, chunk_size: see :class:`ImageJob`.
        death: how many tasks it finishes, and when it dies in the next one; None for a process that lives.
        guests: what happens meanwhile, by number of finished tasks and moment, outside of the lock.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        chunk_size: int,
        death: tuple[int, str] | None = None,
        guests: Mapping[tuple[int, str], Callable[[], None]] | None = None,
    ) -> None:
        self.result, self.death, self.done, self.guests = folder / "result.json", death, [], guests or {}
        plan = {"count": count, "chunk_size": chunk_size}
        self.job = Squares(First, self.result, "squares", plan, count, chunk_size)
        self.job.at = self._at

    def run(self, rank: int, world_size: int) -> None:
        with self.job.lock():
            if self.result.is_file():
                return
            self.job.check_fingerprint()
        with Display(rank, "squaring", "chunk") as display:
            self.job.do(rank, world_size, self._square, display)
        self.job.finalize(self.result, self._join)

    def _square(self, task: int) -> None:
        self._at("before")
        content = json.dumps([number**2 for number in self.job.numbers(task)]).encode()

        def write(file: BinaryIO) -> None:
            file.write(content[: len(content) // 2])
            self._at("half written")
            file.write(content[len(content) // 2 :])

        self.job.finish(task, First(task * self.job.chunk_size), write)
        self.done.append(task)
        self._at("recorded")

    def _at(self, moment: str) -> None:
        number = len(self.done) - (moment == "recorded")
        if (number, moment) in self.guests:
            self.guests[number, moment]()
        if self.death == (number, moment):
            raise Killed

    def _join(self, records: list[First]) -> None:
        chunks = [json.loads((self.job.work / f"chunk-{task}.json").read_text()) for task in range(self.job.tasks)]
        assert [record.first for record in records] == [task * self.job.chunk_size for task in range(self.job.tasks)]
        self.result.write_text(json.dumps([square for chunk in chunks for square in chunk]))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 23),
    chunk_size=st.integers(1, 8),
    guests=st.dictionaries(
        st.tuples(st.integers(0, 4), st.sampled_from(["before", "recorded"])),
        st.tuples(st.integers(0, 1), st.integers(1, 2), st.none() | st.tuples(st.integers(0, 2), st.just("before"))),
    ),
)
def test_a_command_that_is_given_twice_ends_well_both_times(count, chunk_size, guests):
    """While one process computes, others do some or all of the same tasks, and perhaps end the job."""
    with TemporaryDirectory() as place:
        folder = Path(place)

        def guest(rank: int, world_size: int, death: tuple[int, str] | None) -> None:
            with suppress(Killed):
                Process(folder, count, chunk_size, death).run(min(rank, world_size - 1), world_size)

        meanwhile = {moment: partial(guest, *values) for moment, values in guests.items()}
        host = Process(folder, count, chunk_size, guests=meanwhile)
        host.run(0, 1)
        assert json.loads(host.result.read_text()) == [number**2 for number in range(count)]
        assert sorted(path.name for path in folder.iterdir()) == [".squares.lock", "result.json"]


deaths = st.one_of(st.none(), st.tuples(st.integers(0, 4), st.sampled_from(MOMENTS)))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 23),
    chunk_size=st.integers(1, 8),
    worlds=st.lists(st.lists(deaths, min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_any_kills_and_any_numbers_of_processes_give_the_undisturbed_result(count, chunk_size, worlds):
    with TemporaryDirectory() as place:
        folder, done = Path(place), []
        for processes in worlds:  # each a restart of the whole, with another number of processes
            for rank, death in enumerate(processes):
                process = Process(folder, count, chunk_size, death)
                with suppress(Killed):
                    process.run(rank, len(processes))
                done += process.done
        last = Process(folder, count, chunk_size)
        last.run(0, 1)
        assert json.loads(last.result.read_text()) == [number**2 for number in range(count)]
        assert sorted([*done, *last.done]) == list(range(last.job.tasks))  # nothing recorded is done again
        assert not last.job.work.exists()
        before = last.result.read_bytes()
        Process(folder, count, chunk_size).run(0, 1)  # complete: nothing to do
        assert last.result.read_bytes() == before


def test_another_plan_is_refused_and_the_first_difference_named(tmp_path):
    with pytest.raises(Killed):
        Process(tmp_path, 10, 2, (1, "before")).run(0, 1)
    with pytest.raises(UserError, match="count=11, but the squares there was begun with 10"):
        Process(tmp_path, 11, 2).run(0, 1)
    plans = {"source": {"a": "1 file", "b": "2 files"}}
    for source, words in (
        ({"a": "1 file"}, "'b' is gone"),
        ({"a": "1 file", "b": "2 files", "c": "1 file"}, "'c' is new"),
        ({"a": "1 file", "b": "3 files"}, r"'b' has changed .*2 files before, 3 files now"),
    ):
        with pytest.raises(UserError, match=words):
            Squares(First, tmp_path / "result", "squares", {"source": source}, 1, 1).compare(plans)


def test_only_one_of_several_processes_finalizes(tmp_path):
    both = [Process(tmp_path, 8, 2) for _ in range(2)]
    for rank, process in zip(cycle((0, 1)), both, strict=False):
        process.run(rank, 2)
    assert [process.job.finalized for process in both] == [False, True]


@pytest.mark.parametrize(("error", "shown"), [(OSError(28, "No space left on device", "x"), "x: No space left")])
def test_what_ends_a_job_early_says_that_it_goes_on(tmp_path, error, shown, capsys):
    with (
        pytest.raises(UserError, match=rf"{shown}.*Finished chunks are kept; the same command goes on"),
        resumable(0, "squaring", "chunk", tmp_path),
    ):
        raise error
    with pytest.raises(KeyboardInterrupt), resumable(0, "squaring", "chunk", tmp_path):
        raise KeyboardInterrupt
    assert "the same command goes on from there" in capsys.readouterr().err
