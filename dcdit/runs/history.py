"""What a run logged, from its CSV files: all values, or the last one of each metric."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from dcdit.errors import UserError
from dcdit.runtime.files import open_regular

_LARGEST = 1 << 30
"""Bytes of a file of metrics: a million logged steps have a quarter of that."""


@dataclass(frozen=True)
class History:
    """All that a run logged.

    Attributes:
        courses: for each metric the steps at which it was logged, and its values; where a run went back to an earlier
            step, what it had logged of later ones is left out.
        last: for each metric the value that was written last.
    """

    courses: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    last: Mapping[str, float]

    def values(self, name: str) -> Sequence[float]:
        """The values of one metric, without its steps; empty if it was never logged."""
        return self.courses[name][1] if name in self.courses else ()


def history_of(run_dir: Path) -> History:
    """What the run in ``run_dir`` logged; a file that cannot be read counts as empty."""
    versions = {path: path.parent.name.removeprefix("version_") for path in run_dir.glob("logs/version_*/metrics.csv")}
    files = sorted((path for path in versions if versions[path].isdecimal()), key=lambda path: int(versions[path]))
    courses: dict[str, dict[int, float]] = {}
    for path in files:
        with suppress(OSError, RuntimeError):  # a RuntimeError for links in a circle
            status = path.stat()
            values = _read(path, status.st_mtime_ns, status.st_size)
            start = min((step for rows in values.values() for step in rows), default=math.inf)
            courses = {key: {s: v for s, v in rows.items() if s < start} for key, rows in courses.items()}
            for key, rows in values.items():
                courses.setdefault(key, {}).update(rows)
    courses = {key: rows for key, rows in courses.items() if rows}
    last = {key: list(rows.values())[-1] for key, rows in courses.items()}
    ordered = {key: sorted(rows.items()) for key, rows in courses.items()}
    return History({key: ([s for s, _ in rows], [v for _, v in rows]) for key, rows in ordered.items()}, last)


@lru_cache(maxsize=256)
def _read(path: Path, _time: int, _size: int) -> Mapping[str, Mapping[int, float]]:
    """The numbers of one file by column and step; read again if its time or size has changed."""
    columns: dict[str, dict[int, float]] = {}
    with (
        suppress(OSError, UserError, UnicodeDecodeError, csv.Error),
        io.TextIOWrapper(open_regular(path, _LARGEST), "utf-8", newline="") as file,
    ):
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            for key, value in row.items():
                number = _number(value)
                if isinstance(key, str) and number is not None:
                    # A dictionary keeps the position of a value that is replaced; the newest shall stand last.
                    rows = columns.setdefault(key, {})
                    rows.pop(int(step or 0), None)
                    rows[int(step or 0)] = number
    return columns


def _number(value: object) -> float | None:
    """The finite number in a cell; None if the cell is empty, cut off, or belongs to no column."""
    with suppress(TypeError, ValueError):
        number = float(value)  # type: ignore[arg-type]
        return number if math.isfinite(number) else None
    return None


_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """Draw values as one line of at most ``width`` characters; the lowest bar is the least mean of a part."""
    if not values:
        return ""
    heights = means(values, width)
    low, high = min(heights), max(heights)
    if high == low:
        return _BARS[0] * len(heights)
    return "".join(_BARS[round((height - low) / (high - low) * (len(_BARS) - 1))] for height in heights)


def means(values: Sequence[float], parts: int) -> list[float]:
    """The means of ``parts`` equal parts of a sequence; the values themselves if there are no more than that."""
    parts = min(parts, len(values))
    edges = [len(values) * part // parts for part in range(parts + 1)] if parts else []
    return [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
