"""Ways to spoil a file, and who watches what is touched meanwhile."""

import json
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hypothesis import strategies as st

from dcdit.runtime.files import content_digest

KINDS = ("cut", "flip", "zero", "grow")
damages = st.tuples(st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
"""Kind, place and bit of some damage."""


def damaged(content: bytes, damage: tuple[str, float, int]) -> bytes:
    """``content`` cut somewhere, with a bit flipped, with zeros to its end, or longer than it was."""
    kind, share, bit = damage
    place = int(share * len(content))
    if kind == "cut":
        return content[:place]
    if kind == "flip" and content:
        return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
    if kind == "zero":
        return content[:place] + bytes(len(content) - place)
    return content + bytes(1 + place)


def sign(path: Path, **changes) -> None:
    """Change values of a manifest as whoever forges one would: with a digest that fits."""
    content = json.loads(path.read_text()) | changes
    content.pop("digest", None)
    path.write_text(json.dumps({**content, "digest": content_digest(content)}))


def rewrite(path: Path, change) -> Path:
    """Load a checkpoint, have ``change`` change it, and save it, whole, in its place."""
    values = torch.load(path, weights_only=True)
    change(values)
    path.unlink()  # the other names of the file stay what they were
    torch.save(values, path)
    return path


def repack(path: Path, change, compression: int = zipfile.ZIP_STORED) -> Path:
    """Have ``change`` change the members of a zip archive, by name, and write it anew."""
    with zipfile.ZipFile(path) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    change(members)
    path.unlink()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


_watched: list[list[tuple[str, str]]] = []
_WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


def _note(event: str, arguments: tuple) -> None:
    if not _watched:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        paths = [path] if writes or (isinstance(mode, str) and set(mode) & set("wax+")) else []
    else:
        paths = [each for each in arguments if isinstance(each, str | bytes | os.PathLike)] if event in _WRITES else []
    touched = [os.path.abspath(os.fsdecode(each)) for each in paths if not isinstance(each, int)]
    # A module that is imported for the first time leaves its byte code beside it.
    _watched[-1] += [(event, each) for each in touched if "__pycache__" not in Path(each).parts]


sys.addaudithook(_note)


@contextmanager
def nothing_outside(*allowed: Path) -> Iterator[None]:
    """Fail if anything is written, renamed or removed outside of the folders that are ``allowed``."""
    _watched.append([])
    try:
        yield
    finally:
        touched = _watched.pop()
    roots = [os.path.abspath(each) for each in (*allowed, "/dev", "/proc")]
    outside = {each for each in touched if not any(each[1] == root or each[1].startswith(f"{root}/") for root in roots)}
    assert not outside, sorted(outside)
