"""Images in one folder whose classes stand in a file, or are known otherwise."""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from dcdit.checks import shown, visible
from dcdit.errors import UserError
from dcdit.extraction.classes import composed, label_names, notes_on_classes
from dcdit.extraction.folders import digest_of, walk
from dcdit.extraction.readers import Labels
from dcdit.extraction.sources import FileSource, Listing, Request
from dcdit.runtime.files import content_digest, read_text

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


class LabelledSource(FileSource):
    """Image files at any depth below a folder, with a class for each. Shuffled once, by seed.

    The paths that have classes are looked up among the files that lie there: none leads out of the folder.

    Args:
        request: of the command.
        classes: name or number of the class, by the path below the folder, in which accents are composed.
        origin: what says so, for messages and for the record of the extraction.
        partial: leave out files without a class; else they are refused.

    Raises:
        UserError: if an image has no class, a class no image, or a class is unknown.
    """

    def __init__(self, request: Request, classes: Mapping[str, str], origin: str, partial: bool) -> None:
        root, listing = Path(request.source), Listing()
        files = walk(root, root, listing)
        found = [(file, classes.get(composed(file[0]))) for file in files]
        self._check_missing(classes, {composed(path) for path, *_ in files}, listing, request.source, origin)
        unlabelled = [file[0] for file, text in found if text is None]
        if unlabelled and not partial:
            raise UserError(
                f"{origin} says no class of {len(unlabelled)} images in source={request.source}, such as"
                f" {shown(unlabelled[0])}: add them, or leave such images out with reader.partial=true"
            )
        pairs = [(file, text) for file, text in found if text is not None]
        if not pairs:
            raise UserError(f"{origin} names no image in source={request.source}")
        self.classes, labels, self.class_order = label_names(origin, [text for _, text in pairs], request.classes)
        super().__init__(root, [os.fsencode(file[0]) for file, _ in pairs], labels, request.per_task, request.seed)
        self.inventory = {
            "images": f"{len(pairs)} files, names and sizes {digest_of([file for file, _ in pairs])}",
            "labels": f"of {len(pairs)} images, {content_digest({'labels': labels})[:8]}",
            **(request.classes.recorded if request.classes else {}),
        }
        # What lies there without a class is no broken image of this data set.
        self.skipped = tuple(image for image in listing.skipped if composed(image.file) in classes)
        notes = [f"{len(unlabelled)} images without a class in {origin} are left out"] if unlabelled else []
        self.notes = (*listing.describe_left_out(), *notes, *notes_on_classes(self.classes, labels))

    @staticmethod
    def _check_missing(classes: Mapping[str, str], there: set[str], listing: Listing, source: str, origin: str) -> None:
        """Raise :class:`UserError` if images have a class that are neither there nor skipped."""
        skipped = {composed(image.file) for image in listing.skipped}
        missing = [path for path in classes if path not in there and path not in skipped]
        if not missing:
            return
        remedy = "paths are those below source"
        endings = {os.path.splitext(path)[1] for path in there if os.path.splitext(path)[0] == missing[0]}
        if endings:
            remedy = f"set reader.ending={min(endings)}"
        raise UserError(
            f"{origin} names {len(missing)} images that are not in source={source}, such as {shown(missing[0])}:"
            f" {remedy}"
        )


def open_labelled(settings: Labels, request: Request) -> LabelledSource:
    """The images of a folder with the classes of a file."""
    path = Path(settings.labels)
    origin = f"reader.labels={settings.labels}"
    try:
        text = read_text(path).removeprefix("\ufeff")
    except FileNotFoundError:
        raise UserError(f"{origin}: there is no such file") from None
    separator = _SEPARATORS.get(path.suffix.lower())
    rows = _table(text, separator, settings, origin) if separator else _lines(text, origin)
    if not separator and (settings.image_column or settings.label_column):
        raise UserError(f"{origin}: only a .csv or .tsv file has columns, leave out the headings of columns")
    classes: dict[str, str] = {}
    for number, image, label in rows:
        name = composed(os.path.normpath(f"{image}{settings.ending}"))
        if not image or os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"{origin}: line {number}: {shown(name)} is no path of an image below source")
        if not label:
            raise UserError(f"{origin}: line {number}: {shown(name)} has no class")
        if classes.setdefault(name, label) != label:
            raise UserError(f"{origin}: line {number}: {shown(name)} has two classes, {shown(classes[name])} before")
    return LabelledSource(request, classes, origin, settings.partial)


def _table(text: str, separator: str, settings: Labels, origin: str) -> Iterator[tuple[int, str, str]]:
    """Line, image and class of each row of a table with headings."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        headings = [heading.strip() for heading in next(reader, [])]
        columns = []
        for number, (key, name) in enumerate(
            (("image_column", settings.image_column), ("label_column", settings.label_column))
        ):
            if (name is not None and name not in headings) or (name is None and len(headings) < 2):
                asked = f"reader.{key}={name}" if name is not None else f"a column for reader.{key}"
                raise UserError(
                    f"{origin}: {asked} is not among its headings: {', '.join(map(visible, headings[:20]))}"
                )
            columns.append(headings.index(name) if name is not None else number)
        for row in reader:
            if not row:
                continue
            if len(row) <= max(columns):
                raise UserError(f"{origin}: line {reader.line_num} has {len(row)} of {len(headings)} columns")
            yield reader.line_num, row[columns[0]].strip(), row[columns[1]].strip()
    except csv.Error as error:
        raise UserError(f"{origin}: line {reader.line_num} is none of a table: {error}") from None


def _lines(text: str, origin: str) -> Iterator[tuple[int, str, str]]:
    """Line, image and class of each line of a text file."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            image, *label = line.strip().rsplit(maxsplit=1)
            if not label:
                raise UserError(f"{origin}: line {number} is not a path and a class, with a blank between them")
            yield number, image, label[0]
