"""Sets of images to score, or to compare with: latent shards, folders of images, and archives."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.checks import shown
from dcdit.data.decoder import load_decoder, network_latents
from dcdit.data.latents import LatentSpec, Rounding
from dcdit.data.manifest import MANIFEST_NAME
from dcdit.data.shards import CorruptSampleError, Layout
from dcdit.data.splits import check_reference
from dcdit.data.storage import Location, ShardReader
from dcdit.errors import UserError
from dcdit.evaluation.archives import NpzArchive
from dcdit.evaluation.image_set import ImageSet
from dcdit.extraction.decode import decode_image, image_size
from dcdit.extraction.folders import image_files
from dcdit.extraction.sources import Item, UnreadableError, UnusableImageError
from dcdit.runtime.processes import cores, say


class LatentImages(ImageSet):
    """Images that an autoencoder decodes from shards of latents, from the mean where these hold moments.

    Args:
        location: a directory with a manifest, such as ``data/imagenet256/val``.
        device: where to decode.
        autoencoder: decode with this one; None takes the one that the manifest names.
        rounding: of pixels.
        network: the latents of the network whose samples are compared; None compares with nothing.
        key: that they were named with, for messages.

    Raises:
        UserError: if there is no manifest, or no autoencoder, or another one made the latents.
    """

    def __init__(
        self,
        location: Location,
        device: torch.device,
        autoencoder: str | None,
        rounding: Rounding = "round",
        network: LatentSpec | None = None,
        key: str = "reference",
    ) -> None:
        self.key, self.source, self.manifest = key, location.root, location.manifest()
        if network and not autoencoder:
            try:
                note = check_reference(network, self.manifest.spec)
            except UserError as error:
                raise UserError(
                    f"{key}={location.root}: {error}, or name the autoencoder to decode with: autoencoder=..."
                ) from error
            if note:
                say(f"{key}={location.root} {note}")
        self.count = self.manifest.samples
        self._decode = load_decoder(self.manifest.spec, device, autoencoder, rounding)
        self._reader = ShardReader(location, self.manifest.shards)
        self._layout = Layout.of(self.manifest)
        self._ends = np.cumsum([shard.samples for shard in self.manifest.shards])
        self.size, self._device = self._decode.size(device), device

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Decode the latents of these numbers."""
        rows = np.empty((len(numbers), self._layout.array_bytes), np.uint8)
        shards = np.searchsorted(self._ends, numbers, side="right").tolist()
        self._reader.prefetch(sorted(set(shards)), [])
        for row, number, shard in zip(rows, numbers, shards, strict=True):
            index = number - (int(self._ends[shard - 1]) if shard else 0)
            try:
                self._layout.read(self._reader.descriptor(shard), index, False, row)
            except (CorruptSampleError, OSError) as error:
                raise UserError(
                    f"{self.key}: {self.manifest.shards[shard].name}, sample {index} of {self.source}: {error};"
                    " restore the shard"
                ) from error
        stored = torch.from_numpy(rows.view(self._layout.dtype).reshape(-1, *self._layout.stored_shape))
        return self._decode(network_latents(stored.to(self._device), self.manifest, None))

    def described(self) -> dict[str, Any]:
        """Identify the images by the shards' digests and the autoencoder."""
        content = "".join(shard.sha256 for shard in self.manifest.shards)
        return {
            "kind": "decoded latents",
            "content": hashlib.sha256(content.encode()).hexdigest()[:16],
            "autoencoder": self._decode.identity,
            "rounding": self._decode.rounding,
        }


class FolderImages(ImageSet):
    """All images in and below a folder, cropped to a square as for extraction.

    Args:
        root: the folder.
        side: of the crop; None takes images of one size as they are, which must be squares.
        key: that it was named with, for messages.

    Raises:
        UserError: if there are no images.
    """

    def __init__(self, root: Path, side: int | None, key: str = "reference") -> None:
        self.root, self.source, self.key = root, str(root), key
        self._files = image_files(root)
        self.count = len(self._files)
        if not self.count:
            raise UserError(f"{key}={root}: no image lies in or below this folder")
        self._crops = side is not None
        self.size = (side, side) if side is not None else self._size_of_first()

    def _size_of_first(self) -> tuple[int, int]:
        """Return the size of the first image; raise UserError unless it is a square."""
        with self._explaining(0) as content:
            height, width = image_size(content)
        if height != width:
            raise UserError(
                f"{self.key}={self.root}: {self._files[0][0]} has {width} x {height} pixels, which is no square: give"
                f" image_size={min(height, width)} to crop the images, or an .npz"
            )
        return height, width

    @contextmanager
    def _explaining(self, number: int) -> Iterator[bytes]:
        """Yield the bytes of a file; what is wrong with it becomes a UserError."""
        path = self.root / self._files[number][0]
        try:
            yield Item(0, "", str(path)).read()
        except (UnusableImageError, UnreadableError) as error:
            raise UserError(f"{self.key}: {path}: {error}; remove it, or put it right") from error

    def _read(self, number: int) -> Tensor:
        with self._explaining(number) as content:
            if not self._crops and (size := image_size(content)) != self.size:
                path = self.root / self._files[number][0]
                raise UserError(
                    f"{self.key}: {path} has {size[1]} x {size[0]} pixels, the first image"
                    f" {self.size[1]} x {self.size[0]}: give image_size={self.size[0]} to bring all to one size"
                )
            return torch.from_numpy(decode_image(content, self.size[0]))

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Read, resize and crop the files of these numbers."""
        with ThreadPoolExecutor(cores()) as pool:
            return torch.stack(list(pool.map(self._read, numbers))).permute(0, 3, 1, 2)

    def described(self) -> dict[str, Any]:
        """Identify the images by their files' names, sizes and times of change."""
        listing = hashlib.sha256(repr(self._files).encode()).hexdigest()[:16]
        return {"kind": "folder", "content": listing, "crop": self.size[0]}


def check_images(place: str, key: str = "reference") -> None:
    """Check, without any network or latents, that images or statistics are at ``place``: before long work begins.

    Raises:
        UserError: if nothing is there, it is damaged, or it holds neither.
    """
    path = Path(place)
    try:
        if Location(place, None).remote:
            return
        path.stat()
    except FileNotFoundError:
        pass  # told below
    except (OSError, ValueError) as error:  # a name that no file can have, a folder that may not be entered
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={shown(place)}: {reason}. Give a folder of images or shards, or an .npz") from None
    if path.is_file():
        NpzArchive(path, key)
    elif not path.is_dir():
        fault = "is neither a folder nor a file" if path.exists() else "does not exist"
        raise UserError(f"{key}={place} {fault}: give a folder of images or shards, or an .npz")
    elif (path / MANIFEST_NAME).is_file():
        Location(place, None).manifest()
    else:
        _check_folder(path, key)


def _check_folder(path: Path, key: str) -> None:
    """Raise :class:`UserError` if a folder holds splits of latents instead of images."""
    splits = [entry.name for entry in os.scandir(path) if (Path(entry.path) / MANIFEST_NAME).is_file()]
    if splits:
        raise UserError(f"{key}={path} holds several splits: take {key}={path / min(splits)}")


def open_images(
    place: str,
    size: tuple[int, int] | None,
    device: torch.device,
    autoencoder: str | None = None,
    rounding: Rounding = "round",
    cache: str | None = None,
    network: LatentSpec | None = None,
    key: str = "reference",
) -> ImageSet:
    """Open the images at ``place``.

    Args:
        place: a directory of latent shards with a manifest, or its URL; a folder of images; or an ``.npz``.
        size: height and width that they must have; images of a folder are cropped to it. None takes them as they are.
        device, autoencoder, rounding, network: for latents, see :class:`LatentImages`.
        cache: directory for shards fetched from a URL.
        key: that the images were named with, for messages.

    Raises:
        UserError: if there is nothing usable, or it has another size.
    """
    check_images(place, key)
    location, path = Location(place, cache), Path(place)
    images: ImageSet
    if location.remote or (location.directory / MANIFEST_NAME).is_file():
        images = LatentImages(location, device, autoencoder, rounding, network, key)
    elif path.is_dir():
        if size is not None and size[0] != size[1]:
            raise UserError(f"{key}={place}: a folder's images are cropped to squares, not to {size}: give an .npz")
        images = FolderImages(path, None if size is None else size[0], key)
    else:
        images = NpzArchive(path, key)
    if size is not None and images.count and images.size != size:
        raise UserError(
            f"{key}={place} has images of {images.size[0]} x {images.size[1]} pixels, those to compare have"
            f" {size[0]} x {size[1]}: a comparison would mostly see that; give images of one size"
        )
    return images
