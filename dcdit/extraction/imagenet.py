"""ImageNet's validation images as they are published: a flat folder, and a development kit that says their classes.

The kit numbers the classes from 1 in an order of its own (ILSVRC id). The classes here are the WordNet ids in the order
of their names, as the class folders of the training images have it.
"""

import re
from pathlib import Path

from dcdit.checks import reason_of, shown
from dcdit.errors import UserError
from dcdit.extraction.labelled import LabelledSource
from dcdit.extraction.readers import ImageNetVal
from dcdit.extraction.sources import Request
from dcdit.runtime.files import open_regular, read_text

TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_MOST_BYTES = 16 << 20  # of meta.mat, which has 0.2 MB
_WORDNET = re.compile(r"n\d{8}")


def open_imagenet_val(settings: ImageNetVal, request: Request) -> LabelledSource:
    """The validation images with the classes of the development kit.

    Raises:
        UserError: if images or classes are missing, or not what the kit says.
    """
    origin = f"reader.devkit={settings.devkit}"
    numbers = [_whole(origin, TRUTH, line) for line in _text(settings.devkit, TRUTH).split()]
    if settings.synsets is None:
        synsets = _from_meta(origin, _find(settings.devkit, "meta.mat"))
    else:
        synsets = _from_text(settings.synsets)
    if unknown := sorted(set(numbers) - synsets.keys()):
        raise UserError(f"{origin}: {TRUTH} has class {unknown[0]}, of which no WordNet id is known")
    classes = {f"ILSVRC2012_val_{n:08d}.JPEG": synsets[number] for n, number in enumerate(numbers, 1)}
    return LabelledSource(request, classes, origin, partial=False)


def _find(devkit: str, name: str) -> Path:
    """A file of the kit, which lies in its folder ``data``; UserError if there is none."""
    places = [Path(devkit) / "data" / name, Path(devkit) / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"reader.devkit={devkit}: there is no {places[0]}: unpack ILSVRC2012_devkit_t12.tar.gz")
    return found


def _text(devkit: str, name: str) -> str:
    return read_text(_find(devkit, name))


def _whole(origin: str, name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text):
        raise UserError(f"{origin}: {shown(text)} in {name} is no number of a class")
    return int(text)


def _from_text(path: str) -> dict[int, str]:
    """The WordNet id of each ILSVRC id in a text file of pairs."""
    origin, synsets = f"reader.synsets={path}", dict[int, str]()
    try:
        lines = read_text(Path(path)).removeprefix("\ufeff").splitlines()
    except FileNotFoundError:
        raise UserError(f"{origin}: there is no such file") from None
    for line in filter(str.strip, lines):
        number, *names = re.split(r"[\s,]+", line.strip())
        if not names or not _WORDNET.fullmatch(names[0]):
            raise UserError(f"{origin}: {shown(line)} is no line such as `1, n02119789`: ILSVRC id, WordNet id")
        _add(synsets, origin, _whole(origin, "it", number), names[0])
    return synsets


def _from_meta(origin: str, path: Path) -> dict[int, str]:
    """The WordNet id of each ILSVRC id in the kit's own list, a MATLAB file, without those of groups of classes."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            f"{origin}: scipy reads its meta.mat: pip install scipy, or give a text file of `ILSVRC id, WordNet id`"
            " with reader.synsets"
        ) from None
    synsets: dict[int, str] = {}
    try:
        with open_regular(path, _MOST_BYTES) as file:
            table = loadmat(file, variable_names=["synsets"], squeeze_me=True)["synsets"]
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), int(row["num_children"])) for row in table]
    except UserError:
        raise
    except Exception as error:  # whatever a broken file provokes
        raise UserError(
            f"{origin}: {path} cannot be read ({reason_of(error)}): restore it, or give a text file of"
            " `ILSVRC id, WordNet id` with reader.synsets"
        ) from None
    for number, name, children in rows:
        if not children:
            _add(synsets, origin, number, name)
    return synsets


def _add(synsets: dict[int, str], origin: str, number: int, name: str) -> None:
    """Add a pair; UserError if one of the two is there already, or the WordNet id is none."""
    if number in synsets or name in synsets.values() or not _WORDNET.fullmatch(name):
        raise UserError(f"{origin}: class {number} with WordNet id {shown(name)} is there twice, or is none")
    synsets[number] = name
