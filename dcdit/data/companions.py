"""Companion shards: what alignment needs of the samples of a latent shard, in a webdataset tar file beside it.

A sample is ``<key>.jpg``, or ``<key>.features.npy`` and, where the flipped latent is stored too,
``<key>.features_hflip.npy``; then ``<key>.json`` with label and checksums. Training without alignment never opens the
files. JPEGs differ in size: where a sample begins is found by one walk over the headers of the tar file.
"""

import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tarfile import BLOCKSIZE

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from dcdit.data.manifest import Companion, Manifest, Shard
from dcdit.data.shards import (
    CorruptSampleError,
    Layout,
    Sample,
    member_size,
    note_of_sample,
    read_note,
    write_shard,
)
from dcdit.data.statistics import StoredArray, Tally
from dcdit.data.storage import Location, ShardReader
from dcdit.errors import UserError
from dcdit.runtime.files import file_digest, replacing


def encode_pixels(pixels: NDArray[np.uint8], quality: int) -> dict[str, bytes]:
    """The members of a sample that hold an image (height, width, 3) as a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return {"jpg": buffer.getvalue()}


def encode_features(views: Sequence[StoredArray]) -> dict[str, bytes]:
    """The members of a sample that hold features (F, h, w) float16: of the image, and perhaps of the flipped one."""
    names = ("features.npy", "features_hflip.npy")
    headers = (Layout(view.shape, str(view.dtype), False).npy_header for view in views)
    return {name: head + view.tobytes() for name, head, view in zip(names, headers, views, strict=False)}


def companion_name(name: str, kind: str) -> str:
    """The file name of the companion of the shard called ``name``."""
    return f"{name.removesuffix('.tar')}.{kind}.tar"


def write_with_companion(
    path: Path, samples: Iterable[Sample], layout: Layout, tally: Tally, kind: str | None
) -> tuple[Shard | None, Shard | None]:
    """Write a shard of latents, as :func:`write_shard` does, and its companion of a kind; None writes no companion.

    Returns:
        Their entries for the manifest; None, and no file, where there are no samples.
    """
    if kind is None:
        return write_shard(path, samples, layout, tally), None
    beside = path.with_name(companion_name(path.name, kind))
    with replacing(beside) as file, wds.TarWriter(file, mtime=0, user="", group="") as writer:

        def written(samples: Iterable[Sample]) -> Iterator[Sample]:
            for sample in samples:
                note = note_of_sample(sample.label, [zlib.crc32(content) for content in sample.companion.values()], "")
                writer.write({"__key__": sample.key, "json": note, **sample.companion})
                yield sample

        shard = write_shard(path, written(samples), layout, tally)
    if shard is None:
        beside.unlink()
        return None, None
    return shard, Shard(beside.name, shard.samples, beside.stat().st_size, file_digest(beside))


class CompanionReader:
    """Reads samples of companion shards, in any order.

    Args:
        location: of the split.
        companion: its companion shards.
        hflip: whether the split holds flipped latents.
    """

    def __init__(self, location: Location, companion: Companion, hflip: bool) -> None:
        self.companion, self.shards = companion, ShardReader(location, companion.shards)
        self._layout = Layout(companion.shape, "float16", hflip=False)
        self._members = 2 if companion.kind == "pixels" else 2 + hflip
        self._starts: dict[int, NDArray[np.int64]] = {}

    @property
    def dtype(self) -> str:
        """The numpy name of the type that :meth:`read` fills in."""
        return "uint8" if self.companion.kind == "pixels" else "float16"

    def read(self, shard: int, index: int, hflip: bool, label: int, out: NDArray[np.generic]) -> None:
        """Read sample ``index`` of a shard.

        Args:
            shard: number of the shard.
            index: number of the sample within the shard.
            hflip: of the flipped image.
            label: that the latent shard says the sample has.
            out: (shape of the companion), receives pixels or features.

        Raises:
            CorruptSampleError: with the reason.
            OSError: if the shard cannot be read.
        """
        descriptor = self.shards.descriptor(shard)
        if shard not in self._starts:
            self._starts[shard] = self._walk(descriptor, self.companion.shards[shard])
        start, end = self._starts[shard][index : index + 2].tolist()
        contents = list(_members(os.pread(descriptor, end - start, start)))
        view = int(hflip and self.companion.kind == "features")
        content = contents[view]
        known, checksum = read_note(contents[-1], view)
        if known != label or zlib.crc32(content) != checksum:
            raise CorruptSampleError(f"the label or the checksum of its {self.companion.kind} differs")
        if self.companion.kind == "pixels":
            pixels = _decode(content, self.companion.shape[1])
            out[:] = (pixels[:, ::-1] if hflip else pixels).transpose(2, 0, 1)
            return
        header = self._layout.npy_header
        if content[: len(header)] != header or len(content) != len(header) + self._layout.array_bytes:
            raise CorruptSampleError(f"no float16 features of shape {self.companion.shape} follow")
        features = np.frombuffer(content, np.float16, offset=len(header))
        if not np.isfinite(features).all():
            raise CorruptSampleError("its features are not finite")
        out[:] = features.reshape(out.shape)

    def _walk(self, descriptor: int, shard: Shard) -> NDArray[np.int64]:
        """(samples + 1,) the byte at which each sample begins, and the last one ends."""
        positions, size = [0], os.fstat(descriptor).st_size
        for _ in range(shard.samples * self._members):
            header = os.pread(descriptor, BLOCKSIZE, positions[-1])
            positions.append(positions[-1] + BLOCKSIZE + -(-member_size(header) // BLOCKSIZE) * BLOCKSIZE)
            if positions[-1] > size:
                raise CorruptSampleError(f"{shard.name} ends before its samples do")
        return np.array(positions[:: self._members])


def verify_companions(location: Location, manifest: Manifest, companion: Companion) -> list[str]:
    """Read all companion shards; what is wrong with them: their checksums, those of the samples, and the labels."""
    faults, layout = list[str](), Layout.of(manifest)
    shards, reader = ShardReader(location, manifest.shards), CompanionReader(location, companion, manifest.hflip)
    latent, out = np.empty(layout.array_bytes, np.uint8), np.empty(companion.shape, reader.dtype)
    for number, shard in enumerate(companion.shards):
        shards.prefetch([number], [])
        reader.shards.prefetch([number], [])
        try:
            if file_digest(location.fetch(shard)) != shard.sha256:
                faults.append(f"{shard.name}: the checksum of the file differs")
            for index in range(shard.samples):
                for hflip in (False, True)[: 1 + manifest.hflip]:
                    label = layout.read(shards.descriptor(number), index, hflip, latent)
                    reader.read(number, index, hflip, label, out)
        except (CorruptSampleError, OSError, UserError) as error:
            faults.append(f"{shard.name}: {error}")
    return faults


def _members(content: bytes) -> Iterator[bytes]:
    """The contents of the members of a part of a tar file."""
    position = 0
    while position < len(content):
        size = member_size(content[position : position + BLOCKSIZE])
        position += BLOCKSIZE
        yield content[position : position + size]
        position += -(-size // BLOCKSIZE) * BLOCKSIZE


def _decode(content: bytes, side: int) -> NDArray[np.uint8]:
    """The pixels (side, side, 3) of a JPEG, whose size is compared before they are decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if image.size != (side, side) or image.mode != "RGB":
                raise CorruptSampleError(f"its image is no RGB image of {side} x {side} pixels")
            return np.asarray(image)
    except CorruptSampleError:
        raise
    except Exception as error:  # decoders raise whatever a broken file provokes
        raise CorruptSampleError(f"its image cannot be decoded: {error}") from None
