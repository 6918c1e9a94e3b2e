"""Sets of images to compare with: latent shards, folders of images, and the ADM suite's ``.npz``."""

import hashlib
import math
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

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
from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.statistics import Moments
from dcdit.extraction.decode import decode_image
from dcdit.extraction.folders import image_files
from dcdit.extraction.sources import Item, UnreadableError, UnusableImageError
from dcdit.runtime.files import open_archive, open_regular, read_array_header
from dcdit.runtime.processes import cores, say

_DAMAGE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading from a zip archive may raise; RuntimeError if it is encrypted, or packed in an odd way."""


class ImageSet(ABC):
    """A set of real images, numbered from 0.

    Attributes:
        source: path or URL, for messages.
        count: number of images; 0 of an archive that holds statistics alone.
        size: height and width.
    """

    source: str
    count: int
    size: tuple[int, int]

    @abstractmethod
    def read(self, numbers: Sequence[int]) -> Tensor:
        """Read the images of these numbers, (n, 1 or 3, height, width) uint8; raise UserError if one cannot be read."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Return plain values that identify the images: other images have other values."""

    def moments(self, network: FeatureNetwork) -> dict[str, Moments]:
        """Return statistics that come with the images and stand for a larger set: of ``features``, ``spatial`` ones."""
        return {}


class LatentImages(ImageSet):
    """Images that an autoencoder decodes from shards of latents, from the mean where these hold moments.

    Args:
        location: a directory with a manifest, such as ``data/imagenet256/val``.
        device: where to decode.
        autoencoder: decode with this one; None takes the one that the manifest names.
        rounding: of pixels.
        network: the latents of the network whose samples are compared; None compares with nothing.

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
    ) -> None:
        self.source, self.manifest = location.root, location.manifest()
        if network and not autoencoder:
            try:
                note = check_reference(network, self.manifest.spec)
            except UserError as error:
                raise UserError(
                    f"reference={location.root}: {error}, or name the autoencoder to decode with: autoencoder=..."
                ) from error
            if note:
                say(f"reference={location.root} {note}")
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
                    f"reference: {self.manifest.shards[shard].name}, sample {index} of {self.source}: {error};"
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
        size: side of the crop.

    Raises:
        UserError: if there are no images.
    """

    def __init__(self, root: Path, size: int) -> None:
        self.root, self.source, self.size = root, str(root), (size, size)
        self._files = image_files(root)
        self.count = len(self._files)
        if not self.count:
            raise UserError(f"reference={root}: no image lies in or below this folder")

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Read, resize and crop the files of these numbers."""

        def decoded(number: int) -> torch.Tensor:
            path = self.root / self._files[number][0]
            try:
                return torch.from_numpy(decode_image(Item(0, "", str(path)).read(), self.size[0]))
            except (UnusableImageError, UnreadableError) as error:
                raise UserError(f"reference: {path}: {error}; remove it, or put it right") from error

        with ThreadPoolExecutor(cores()) as pool:
            return torch.stack(list(pool.map(decoded, numbers))).permute(0, 3, 1, 2)

    def described(self) -> dict[str, Any]:
        """Identify the images by their files' names, sizes and times of change."""
        listing = hashlib.sha256(repr(self._files).encode()).hexdigest()[:16]
        return {"kind": "folder", "content": listing, "crop": self.size[0]}


class NpzArchive(ImageSet):
    """An ``.npz`` as the ADM suite publishes it, read piece by piece; every array may be missing, but not all.

    ``arr_0`` are images, (N, height, width, 3) uint8. ``mu``, ``sigma`` and ``mu_s``, ``sigma_s`` are means and
    covariances of the features and of the spatial features of the whole set, of which the images are a part.

    Args:
        path: the file.

    Raises:
        UserError: if it holds neither images nor statistics.
    """

    _IMAGES = "arr_0"
    _MOMENTS: ClassVar = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}

    def __init__(self, path: Path) -> None:
        self.path, self.source, self.count, self.size = path, str(path), 0, (0, 0)
        try:
            self._archive = open_archive(open_regular(path))
            self._names = {name.removesuffix(".npy") for name in self._archive.namelist()}
            if self._IMAGES in self._names:
                (self.count, *size, channels), _, self._start = self._header(self._IMAGES, ("u1",), 4)
                self.size = (size[0], size[1])
                if channels != 3:
                    raise ValueError(f"{self._IMAGES} has {channels} channels, not 3")
            elif not any(self._names.issuperset(pair) for pair in self._MOMENTS.values()):
                raise ValueError(f"it holds {', '.join(sorted(self._names)[:5]) or 'nothing'} alone")
        except UserError as error:
            raise UserError(f"reference={error}") from error
        except zipfile.BadZipFile as error:
            raise UserError(f"reference={path} is damaged, or no .npz ({error}): copy or download it again") from error
        except (ValueError, *_DAMAGE) as error:
            raise UserError(
                f"reference={path} holds neither images as arr_0, (N, height, width, 3) uint8, nor statistics as mu and"
                f" sigma ({error}): give another file"
            ) from error

    def _header(self, name: str, kinds: tuple[str, ...], axes: int) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """Return an array's shape, type and beginning; raise ValueError if it is of another kind, or too short."""
        with self._archive.open(f"{name}.npy") as file:
            shape, dtype = read_array_header(file)
            if dtype.str[1:] not in kinds or len(shape) != axes or not all(shape):
                raise ValueError(f"{name} is {dtype} of shape {shown(shape)}")
            if math.prod(shape) * dtype.itemsize > self._archive.getinfo(f"{name}.npy").file_size:
                raise ValueError(f"{name} is too short for {shape}")
            return shape, dtype, file.tell()

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Read these numbers from the archive."""
        height, width = self.size
        images = np.empty((len(numbers), height, width, 3), np.uint8)
        with self._archive.open(f"{self._IMAGES}.npy") as file:
            for image, number in zip(images, numbers, strict=True):
                try:
                    file.seek(self._start + number * image.nbytes)
                    content = file.read(image.nbytes)
                except _DAMAGE as error:
                    raise UserError(f"reference={self.path}: image {number} is damaged ({error})") from error
                if len(content) < image.nbytes:
                    raise UserError(f"reference={self.path} ends within image {number}: it was cut short")
                image[:] = np.frombuffer(content, np.uint8).reshape(image.shape)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def moments(self, network: FeatureNetwork) -> dict[str, Moments]:
        """Return the statistics in the archive, if they are of the network's features.

        Raises:
            UserError: if statistics are there that have not as many numbers as the network has features.
        """
        if not network.archive_statistics:
            return {}
        widths = {"features": network.num_features, "spatial": network.num_spatial}
        return {
            kind: Moments.of_gaussian(self._numbers(mean, (width,)), self._numbers(covariance, (width, width)))
            for (kind, (mean, covariance)), width in zip(self._MOMENTS.items(), widths.values(), strict=True)
            if width and self._names.issuperset((mean, covariance))
        }

    def _numbers(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read an array of float numbers of this shape."""
        try:
            stored, dtype, start = self._header(name, ("f8", "f4"), len(shape))
            if stored != shape:
                raise ValueError(f"it has shape {stored}, the features ask for {shape}")
            with self._archive.open(f"{name}.npy") as file:
                file.seek(start)
                content = file.read(math.prod(shape) * dtype.itemsize)
            numbers = np.frombuffer(bytearray(content), f"<{dtype.str[1:]}")
            if not np.isfinite(numbers).all():
                raise ValueError("not all of it is finite")
            tensor = torch.from_numpy(numbers.reshape(shape)).double()
            if len(shape) == 2 and not torch.allclose(tensor, tensor.T, rtol=1e-4, atol=1e-8):
                raise ValueError("a covariance is symmetric, this is not")
            if len(shape) == 2 and tensor.diagonal().min() < 0:
                raise ValueError("a covariance has no negative variances, this has")
        except (ValueError, *_DAMAGE) as error:
            raise UserError(f"reference={self.path}: {name} cannot be used: {error}") from error
        return tensor

    def described(self) -> dict[str, Any]:
        """Identify the images and statistics by the checksums in the archive."""
        names = [self._IMAGES, *(name for pair in self._MOMENTS.values() for name in pair)]
        checksums = [self._archive.getinfo(f"{name}.npy").CRC for name in names if name in self._names]
        return {"kind": "npz", "content": " ".join(f"{checksum:08x}" for checksum in checksums)}


def check_exists(reference: str) -> None:
    """Raise :class:`UserError` if nothing is at ``reference``, for whoever has long work before :func:`open_images`."""
    path = Path(reference)
    if not Location(reference, None).remote and not path.is_file() and not path.is_dir():
        fault = "is neither a folder nor a file" if path.exists() else "does not exist"
        raise UserError(f"reference={reference} {fault}: give a folder of images or shards, or an .npz")


def open_images(
    reference: str,
    size: tuple[int, int],
    device: torch.device,
    autoencoder: str | None = None,
    rounding: Rounding = "round",
    cache: str | None = None,
    network: LatentSpec | None = None,
) -> ImageSet:
    """Open the images at ``reference``.

    Args:
        reference: a directory of latent shards with a manifest, or its URL; a folder of images; or an ``.npz``.
        size: height and width that they must have; images of a folder are cropped to it.
        device, autoencoder, rounding, network: for latents, see :class:`LatentImages`.
        cache: directory for shards fetched from a URL.

    Raises:
        UserError: if there is nothing usable, or it has another size.
    """
    check_exists(reference)
    location, path = Location(reference, cache), Path(reference)
    images: ImageSet
    if location.remote or (location.directory / MANIFEST_NAME).is_file():
        images = LatentImages(location, device, autoencoder, rounding, network)
    elif path.is_dir():
        splits = [entry.name for entry in os.scandir(path) if (Path(entry.path) / MANIFEST_NAME).is_file()]
        if splits:
            raise UserError(f"reference={reference} holds several splits: take reference={path / min(splits)}")
        if size[0] != size[1]:
            raise UserError(
                f"reference={reference}: a folder's images are cropped to squares, not to {size}: give an .npz"
            )
        images = FolderImages(path, size[0])
    else:
        images = NpzArchive(path)
    if images.count and images.size != size:
        raise UserError(
            f"reference={reference} has images of {images.size[0]} x {images.size[1]} pixels, the checkpoint samples"
            f" {size[0]} x {size[1]}: a comparison would mostly see that; give a reference of this size"
        )
    return images
