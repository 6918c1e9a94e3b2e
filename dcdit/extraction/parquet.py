"""Images in parquet files as the Hugging Face hub has them: bytes in one column, classes in another.

pyarrow reads them where they are, one row group at a time. The package ``datasets`` would first copy all images into
files of its own; and where it streams, no row can be read before all rows in front of it.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from dcdit.checks import reason_of, shown, visible
from dcdit.errors import UserError
from dcdit.extraction.classes import label_names, notes_on_classes, renumbered
from dcdit.extraction.readers import Parquet
from dcdit.extraction.repositories import Files, find_files
from dcdit.extraction.sources import (
    LARGEST_IMAGE,
    NumberedItem,
    Request,
    ShuffledSource,
    UnreadableError,
    UnusableImageError,
)
from dcdit.runtime.imports import check_installed

_PIECES = 50
"""Pieces of consecutive rows of which a shard consists at least, so that it mixes the classes of a sorted file."""

_LARGEST_GROUP = 4 << 30
"""Bytes that the images of a row group have at most; each process that decodes images holds one row group."""


class ParquetSource(ShuffledSource):
    """Rows of parquet files, in pieces of consecutive rows that are shuffled once by seed.

    Args:
        request: of the command.
        settings: of the reader.
        files: the parquet files.

    Raises:
        UserError: if a file is broken, lacks a column, or classes are unknown.
    """

    def __init__(self, request: Request, settings: Parquet, files: Files) -> None:
        self._files, self._column, self._where = files, settings.image_column, f"source={request.source}"
        self._held: tuple[int, Any] | None = None
        groups: list[tuple[int, int]] = []
        rows: list[int] = []
        own_names: list[str] | None = None
        values: list[Any] = []
        self.inventory = {**files.record, **(request.classes.recorded if request.classes else {})}
        for number, name in enumerate(files.names):
            counts, names, labels, size = self._survey(name, settings)
            if number and names != own_names:
                raise UserError(f"{self._where}: {visible(name)} has other classes than {visible(files.names[0])}")
            groups += [(number, group) for group in range(len(counts))]
            rows, own_names, values = rows + counts, names, values + labels
            self.inventory[name] = f"{size} bytes, {sum(counts)} rows"
        if not values:
            raise UserError(f"{self._where}: its parquet files have no rows")
        origin = f"{self._where} reader.label_column={settings.label_column}"
        self.classes, labels, self.class_order = _labels(origin, own_names, values, request)
        self._groups, self._ends = np.array(groups), np.cumsum(rows)
        super().__init__(np.array(labels), shuffled_pieces(rows, request.per_task, request.seed), request.per_task)
        self.notes = tuple(notes_on_classes(self.classes, labels))

    def _survey(self, name: str, settings: Parquet) -> tuple[list[int], list[str] | None, list[Any], int]:
        """Of a file: rows of each row group, names of its classes, the class of each row, and its size in bytes."""
        from pyarrow import parquet

        try:
            with closing(self._files.open(name)) as raw:
                size = raw.seek(0, 2)
                file = parquet.ParquetFile(raw, pre_buffer=False)
                columns = file.schema_arrow.names
                for key, column in (("image_column", self._column), ("label_column", settings.label_column)):
                    if column not in columns:
                        listed = ", ".join(map(visible, columns[:20]))
                        raise UserError(f"reader.{key}={column} is none of its columns: {listed}")
                metadata = file.metadata
                counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
                for group in range(metadata.num_row_groups):
                    self._check_size(metadata.row_group(group))
                labels = file.read(columns=[settings.label_column], use_threads=False).column(0).to_pylist()
                return counts, _names_of(file.schema_arrow.metadata, settings.label_column), labels, size
        except UserError as error:
            raise UserError(f"{self._where}: {visible(name)}: {error}") from error
        except Exception as error:  # of pyarrow, for whatever a broken file holds, of the disk and of the hub
            raise UserError(f"{self._where}: {visible(name)} cannot be read: {reason_of(error)}") from error

    def _check_size(self, group: Any) -> None:
        parts = [group.column(number) for number in range(group.num_columns)]
        size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == self._column)
        if size > _LARGEST_GROUP:
            raise UserError(
                f"a row group has {size} bytes of images, at most {_LARGEST_GROUP} are read at once: write the file"
                " again with smaller ones, such as pyarrow.parquet.write_table(table, file, row_group_size=100)"
            )

    @override
    def item(self, number: int, label: int) -> NumberedItem:
        group = int(np.searchsorted(self._ends, number, "right"))
        file = int(self._groups[group, 0])
        first = int(np.searchsorted(self._groups[:, 0], file))
        start = int(self._ends[first - 1]) if first else 0
        name = visible(self._files.names[file])
        return NumberedItem(label, f"{name}/{number - start}", name, number=number)

    @override
    def read(self, item: Any) -> bytes:
        group = int(np.searchsorted(self._ends, item.number, "right"))
        if self._held is None or self._held[0] != group:
            self._held = None  # so that no process holds two
            self._held = group, self._row_group(*self._groups[group].tolist())
        images = self._held[1]
        value = images[item.number - int(self._ends[group]) + len(images)].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise UnusableImageError(f"its column {self._column} holds no bytes of an image")
        if len(content) > LARGEST_IMAGE:
            raise UnusableImageError(f"it has {len(content)} bytes, at most {LARGEST_IMAGE} are read")
        return content

    def _row_group(self, file: int, group: int) -> Any:
        """The column of images of a row group."""
        from pyarrow import parquet

        name = self._files.names[file]
        try:
            with closing(self._files.open(name)) as raw:
                table = parquet.ParquetFile(raw, pre_buffer=False)
                return table.read_row_group(group, columns=[self._column], use_threads=False).column(0)
        except Exception as error:  # of pyarrow, of the disk and of the hub
            raise UnreadableError(f"{visible(name)} cannot be read: {reason_of(error)}") from error


def open_parquet(settings: Parquet, request: Request) -> ParquetSource:
    """The rows of parquet files."""
    check_installed("pyarrow", "reader=parquet")
    files = find_files(request.source, settings.files, ".parquet", settings.revision, settings.stream)
    return ParquetSource(request, settings, files)


def shuffled_pieces(rows: Sequence[int], per_task: int, seed: int) -> NDArray[np.int64]:
    """Numbers of all rows, in shuffled pieces of consecutive rows of one row group.

    A row alone would cost the reading of its row group. A shard consists of at least :data:`_PIECES` pieces.

    Args:
        rows: of each row group.
        per_task: rows of a shard.
        seed: of the shuffle.
    """
    longest = max(1, per_task // _PIECES)
    begins = np.cumsum([0, *rows])
    pieces = [
        np.arange(start, min(start + longest, end))
        for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True)
        for start in range(begin, end, longest)
    ]
    order = np.random.default_rng(seed).permutation(len(pieces))
    return np.concatenate([pieces[number] for number in order])


def _names_of(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """The names of the classes, which ``datasets`` writes into the schema; None if there are none."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


def _labels(
    origin: str, names: list[str] | None, values: list[Any], request: Request
) -> tuple[tuple[str, ...], list[int], str]:
    """Classes, labels, and where the order comes from; UserError if a row has no class, or an unknown one."""
    for row, value in enumerate(values):
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise UserError(f"{origin}: row {row} has {shown(value)}, which is neither a number nor a name of a class")
    if names is None or not all(isinstance(value, int) for value in values):
        return label_names(origin, [str(value) for value in values], request.classes)
    if isinstance(request.given, int):
        raise UserError(f"classes={request.given}: {origin} names its classes, leave their number out")
    return renumbered(origin, names, values, request.classes)
