"""Latent shards: webdataset tar files whose samples all take the same number of bytes.

A sample is ``<key>.json`` with label, checksums and the image's name, ``<key>.latent.npy``, and
``<key>.latent_hflip.npy`` where the flipped image was encoded too. Any webdataset reader takes the files. Since sample
i of a shard begins at i times the sample's size, this one reads any sample with one call, without an index.
"""

import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from tarfile import BLOCKSIZE

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from dcdit.data.manifest import Manifest, Shard
from dcdit.data.statistics import StoredArray, Tally
from dcdit.runtime.files import file_digest, open_regular, replacing

_LARGEST_NOTE = BLOCKSIZE  # the JSON of a sample fills one block of the tar file
_NOTE_BYTES = BLOCKSIZE + _LARGEST_NOTE  # with the header of its tar member
_SIZE_FIELD = slice(124, 135)  # of a tar header, octal


class CorruptSampleError(Exception):
    """A sample that cannot be read: says which and why."""


@dataclass(frozen=True)
class Sample:
    """One image's latents as stored.

    Attributes:
        key: unique name within all shards.
        latent: (C, H, W), or (2C, H, W) for moments.
        hflip: the same of the flipped image; None if the shards hold none.
        source: name of the image, for messages.
        companion: contents of its members in the companion shard, by name, see :mod:`dcdit.data.companions`.
    """

    key: str
    label: int
    latent: StoredArray
    hflip: StoredArray | None = None
    source: str = ""
    companion: Mapping[str, bytes] = field(default_factory=dict)


def note_of_sample(label: int, checksums: list[int], source: str) -> bytes:
    """The JSON member of a sample; a long source loses its beginning."""
    while True:
        note = json.dumps({"label": label, "crc32": checksums, "source": source}).encode()
        if len(note) <= _LARGEST_NOTE:
            return note
        source = source[max(1, (len(note) - _LARGEST_NOTE) // 6) :]


def read_note(note: bytes, number: int) -> tuple[int, int]:
    """The label in what :func:`note_of_sample` returned, and one of the checksums; CorruptSampleError if unreadable."""
    try:
        values = json.loads(note)
        label, checksum = values["label"], values["crc32"][number]
        if type(label) is not int or type(checksum) is not int:  # 3.9, true and Infinity are no labels
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise CorruptSampleError("label and checksum are unreadable") from None
    return label, checksum


def member_size(header: bytes) -> int:
    """Bytes of a member of a tar file, from its header; CorruptSampleError if that is none."""
    try:
        size = int(header[_SIZE_FIELD], 8)
    except ValueError:
        size = -1
    if size < 0:
        raise CorruptSampleError("label and checksum are unreadable")
    return size


@dataclass(frozen=True)
class Layout:
    """The positions of header, JSON and arrays within the bytes of a sample.

    Attributes:
        stored_shape: of an array.
        dtype: numpy name of its type.
        hflip: whether a second array follows the first.
    """

    stored_shape: tuple[int, ...]
    dtype: str
    hflip: bool

    @classmethod
    def of(cls, manifest: Manifest) -> "Layout":
        """The layout of the shards that ``manifest`` describes."""
        return cls(manifest.stored_shape, manifest.dtype, manifest.hflip)

    @cached_property
    def npy_header(self) -> bytes:
        """The header that ``numpy.save`` writes before the array; no other, above all none of a pickle, is accepted."""
        buffer = io.BytesIO()
        values = {"descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": self.stored_shape}
        np.lib.format.write_array_header_1_0(buffer, values)
        return buffer.getvalue()

    @cached_property
    def array_bytes(self) -> int:
        """Number of bytes of one array."""
        return int(np.prod(self.stored_shape)) * np.dtype(self.dtype).itemsize

    @cached_property
    def member_bytes(self) -> int:
        """Bytes of a tar member with one array, header and padding included."""
        blocks = -(-(len(self.npy_header) + self.array_bytes) // BLOCKSIZE)
        return (1 + blocks) * BLOCKSIZE

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample: the distance between two of them."""
        return _NOTE_BYTES + self.member_bytes * (1 + self.hflip)

    def read(self, descriptor: int, index: int, hflip: bool, out: NDArray[np.uint8]) -> int:
        """Read sample ``index`` of an open shard; returns its label.

        Args:
            descriptor: of the file.
            index: number of the sample within the shard.
            hflip: which of the two arrays.
            out: (array_bytes,) uint8, receives the array.

        Raises:
            CorruptSampleError: with the key if it can be read, and the reason.
        """
        start = index * self.sample_bytes
        note, member = bytearray(_NOTE_BYTES), bytearray(self.member_bytes)
        bytes_read = os.preadv(descriptor, [note], start)
        bytes_read += os.preadv(descriptor, [member], start + _NOTE_BYTES + self.member_bytes * hflip)
        if bytes_read < len(note) + len(member):
            raise CorruptSampleError("the file ends before it")
        name = f"key {bytes(note[:100]).split(b'.json')[0].decode('ascii', 'replace')}"
        try:
            length = member_size(bytes(note[:BLOCKSIZE]))
            label, expected = read_note(bytes(note[BLOCKSIZE : BLOCKSIZE + length]), hflip)
        except CorruptSampleError as error:
            raise CorruptSampleError(f"{name}: {error}") from None
        payload = BLOCKSIZE + len(self.npy_header)
        if member[BLOCKSIZE:payload] != self.npy_header:
            raise CorruptSampleError(f"{name}: no {self.dtype} array of shape {self.stored_shape} follows")
        array = memoryview(member)[payload : payload + self.array_bytes]
        if zlib.crc32(array) != expected:
            raise CorruptSampleError(f"{name}: the checksum of its latent differs")
        if not np.isfinite(np.frombuffer(array, self.dtype)).all():
            raise CorruptSampleError(f"{name}: its latent is not finite")
        out[:] = np.frombuffer(array, np.uint8)
        return label


def write_shard(path: Path, samples: Iterable[Sample], layout: Layout, tally: Tally) -> Shard | None:
    """Write one shard, whole or not at all, while ``tally`` sums up its arrays; equal samples give equal bytes.

    Returns:
        Its entry for the manifest; None, and no file, if there are no samples.
    """
    samples, count = iter(samples), 0
    first = next(samples, None)
    if first is None:
        return None
    # File names as strings would go through webdataset's URL opener.
    with replacing(path) as file, wds.TarWriter(file, mtime=0, user="", group="") as writer:
        for sample in chain([first], samples):
            arrays = [sample.latent] if sample.hflip is None else [sample.latent, sample.hflip]
            for array in arrays:
                assert (array.shape, str(array.dtype)) == (layout.stored_shape, layout.dtype)
                tally.add(array)
            assert len(arrays) == 1 + layout.hflip
            contents = [array.tobytes() for array in arrays]
            members = {"json": note_of_sample(sample.label, list(map(zlib.crc32, contents)), sample.source)}
            # webdataset writes the members in alphabetical order, on which the layout relies
            for name, content in zip(("latent.npy", "latent_hflip.npy"), contents, strict=False):
                members[name] = layout.npy_header + content
            writer.write({"__key__": sample.key, **members})
            count += 1
    size = path.stat().st_size
    assert size >= count * layout.sample_bytes
    return Shard(path.name, count, size, file_digest(path))


def read_samples(
    path: Path, shard: Shard, layout: Layout, faults: list[str]
) -> Iterator[tuple[int, bool, StoredArray]]:
    """Label, whether flipped, and stored array of all in a shard, in the order in which they were written.

    Samples that cannot be read are passed over, and what is wrong with them is added to ``faults``.
    """
    with open_regular(path) as file:
        for index in range(shard.samples):
            for hflip in (False, True)[: 1 + layout.hflip]:
                row = np.empty(layout.array_bytes, np.uint8)
                try:
                    label = layout.read(file.fileno(), index, hflip, row)
                except CorruptSampleError as error:
                    faults.append(f"{shard.name}, sample {index}: {error}")
                else:
                    yield label, hflip, row.view(layout.dtype).reshape(layout.stored_shape)
