"""Names and order of classes: a label is an index into them, so another order is another data set."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dcdit.checks import is_plain_whole, shown, visible
from dcdit.errors import UserError
from dcdit.runtime.files import content_digest, read_text

composed = partial(unicodedata.normalize, "NFC")
"""A name with accents composed, as most systems store it; macOS decomposes them."""

BY_NAME = "of their names"
ORDER = "order of the classes"
"""The entry of an inventory that records an order which a file gives."""


@dataclass(frozen=True)
class WantedClasses:
    """Classes that hold for a source, whatever is in it; it may lack some.

    Attributes:
        names: in the order of the labels.
        origin: where they come from, in a few words.
        remedy: what to do about a class that is not among them.
        recorded: their entry in the inventory of a source that sorts by name otherwise; none if it needs none.
    """

    names: tuple[str, ...]
    origin: str
    remedy: str
    recorded: dict[str, str]

    @classmethod
    def of_train(cls, names: tuple[str, ...]) -> "WantedClasses":
        """The classes of the train split, which hold for all splits."""
        remedy = f"its {len(names)} classes hold for all splits; extract train anew, or leave this class out"
        return cls(names, "the train split", remedy, {})

    @classmethod
    def of_key(cls, classes: int | str) -> "WantedClasses":
        """The classes of the key ``classes``: their number, or a text file; UserError if it is neither."""
        names = class_names(classes)
        digest = content_digest({"classes": names})[:8]
        recorded = {} if isinstance(classes, int) else {ORDER: f"{len(names)} names of a file, {digest}"}
        return cls(names, f"classes={classes}", "add it there, or leave it out", recorded)

    def labels(self, source: str, names: Iterable[str]) -> list[int]:
        """The label of each of ``names``, whose accents may be composed or not.

        Raises:
            UserError: if a name is none of the classes, or of several; the message begins with ``source``.
        """
        by_name = {composed(name): label for label, name in enumerate(self.names)}
        given = list(map(composed, names))
        if unknown := sorted(set(given) - by_name.keys()):
            others = f", nor {len(unknown) - 1} others" if unknown[1:] else ""
            raise UserError(f"{source}: {self.origin} has no class {shown(unknown[0])}{others}: {self.remedy}")
        used = set(given)
        for name, count in Counter(map(composed, self.names)).items():
            if count > 1 and name in used:
                raise UserError(f"{source}: {count} classes of {self.origin} are called {shown(name)}: number them")
        return [by_name[name] for name in given]


def class_names(classes: int | str) -> tuple[str, ...]:
    """Names from a number of classes or a text file; UserError for anything else."""
    if isinstance(classes, int):
        return tuple(str(label) for label in range(classes))
    if not Path(classes).is_file():
        raise UserError(
            f"classes={classes} is no file: give the number of classes, or a text file with one name per line"
        )
    names = tuple(map(str.strip, read_text(Path(classes)).removeprefix("\ufeff").rstrip().split("\n")))
    for number, name in enumerate(names, 1):
        if not name or visible(name) != name:
            fault = "holds control characters" if name else "is empty"
            raise UserError(f"classes={classes}: line {number} {fault}; each line is the name of a class")
    return names


def label_names(
    source: str, texts: Sequence[str], wanted: WantedClasses | None
) -> tuple[tuple[str, ...], list[int], str]:
    """The classes that ``texts`` name, or number from 0.

    Args:
        source: what gives the texts; messages begin with it.
        texts: the class of each image.
        wanted: classes that hold; None takes the names among ``texts``, sorted.

    Returns:
        The classes, the label of each text, and where the order comes from.

    Raises:
        UserError: if a text names no class, or is a number and nothing says of what.
    """
    for text in set(texts):
        if not text or visible(text) != text:
            fault = f"the class {shown(text)} holds control characters" if text else "an image has an empty class"
            raise UserError(f"{source}: {fault}; each image has the name or the number of a class")
    numbered = all(map(is_plain_whole, texts))
    if wanted is None:
        if numbered:
            raise UserError(
                f"{source}: its classes are numbers, such as {texts[0]}: say how many there are with classes=..., or"
                " give a text file with one name per line, in the order of the numbers, from 0"
            )
        names = tuple(sorted(set(map(composed, texts))))
        by_name = {name: label for label, name in enumerate(names)}
        return names, [by_name[composed(text)] for text in texts], BY_NAME
    if numbered and not set(texts) <= set(wanted.names):
        for text in texts:
            if not 0 <= int(text) < len(wanted.names):
                raise UserError(
                    f"{source}: label {text} is none of the {len(wanted.names)} classes of {wanted.origin}, which"
                    f" have the labels 0 to {len(wanted.names) - 1}"
                )
        return wanted.names, [int(text) for text in texts], f"of {wanted.origin}"
    return wanted.names, wanted.labels(source, texts), f"of {wanted.origin}"


def renumbered(
    source: str, names: Sequence[str], labels: Sequence[int], wanted: WantedClasses | None
) -> tuple[tuple[str, ...], list[int], str]:
    """The labels of a source that names its classes, among the classes that hold.

    Args:
        source: what gives the labels; messages begin with it.
        names: its classes, in the order of its own labels.
        labels: its own label of each image.
        wanted: classes that hold; None takes those of the source.

    Returns:
        The classes, the label of each image, and where the order comes from.

    Raises:
        UserError: if a label is out of range, or of a class that is not among the wanted ones.
    """
    for label in set(labels):
        if not 0 <= label < len(names) or not names[label] or visible(names[label]) != names[label]:
            name = f", called {shown(names[label])}" if 0 <= label < len(names) else ""
            raise UserError(f"{source}: label {label}{name} is none of its {len(names)} classes with names")
    if wanted is None:
        return tuple(map(composed, names)), list(labels), "of the data set"
    used = sorted(set(labels))
    table = dict(zip(used, wanted.labels(source, [names[label] for label in used]), strict=True))
    return wanted.names, [table[label] for label in labels], f"of {wanted.origin}"


def describe_empty_classes(names: Sequence[str], classes: int) -> str:
    """A sentence on the classes ``names``, of ``classes`` in all, that have no images."""
    listed = ", ".join(repr(visible(name)) for name in names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} of {classes} classes have no images (they keep their labels): {listed}"


def notes_on_classes(classes: Sequence[str], labels: Iterable[int]) -> list[str]:
    """Sentences on the classes that none of ``labels`` names; none if all have images."""
    used = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in used]
    return [describe_empty_classes(empty, len(classes))] if empty else []
