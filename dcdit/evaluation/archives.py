"""Images and statistics in an ``.npz``, as the ADM suite publishes them and as other programs write them."""

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dcdit.checks import shown
from dcdit.errors import UserError
from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.image_set import ImageSet
from dcdit.evaluation.statistics import Moments
from dcdit.runtime.files import open_archive, open_regular, read_array_header

_DAMAGE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading from a zip archive may raise; RuntimeError if it is encrypted, or packed in an odd way."""

_PEEKED = 1 << 20
"""Bytes of images of another type that are looked at, for a message that says how to convert them."""


class NpzArchive(ImageSet):
    """An ``.npz`` as the ADM suite publishes it, read piece by piece; every array may be missing, but not all.

    ``arr_0`` are images, (N, height, width, 3) uint8. ``mu``, ``sigma`` and ``mu_s``, ``sigma_s`` are means and
    covariances of the features and of the spatial features of the whole set, of which the images are a part. Nothing
    in it is unpickled.

    Args:
        path: the file.
        key: that it was named with, for messages.

    Raises:
        UserError: if it holds neither images nor statistics, or images of another type or shape.
    """

    _IMAGES = "arr_0"
    _MOMENTS: ClassVar = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}

    def __init__(self, path: Path, key: str = "reference") -> None:
        self.path, self.key, self.source, self.count, self.size = path, key, str(path), 0, (0, 0)
        self._file: IO[bytes] | None = None
        try:
            self._archive = open_archive(open_regular(path))
            self._names = {name.removesuffix(".npy") for name in self._archive.namelist()}
            if self._IMAGES in self._names:
                self.count, *size = self._check_images()
                self.size = (size[0], size[1])
            elif not any(self._names.issuperset(pair) for pair in self._MOMENTS.values()):
                raise ValueError(f"it holds {', '.join(sorted(self._names)[:5]) or 'nothing'} alone")
        except UserError as error:
            raise UserError(f"{key}={error}") from error
        except zipfile.BadZipFile as error:
            raise UserError(f"{key}={path} is damaged, or no .npz ({error}): copy or download it again") from error
        except (ValueError, *_DAMAGE) as error:
            raise UserError(
                f"{key}={path} holds neither images as arr_0, (N, height, width, 3) uint8, nor statistics as mu and"
                f" sigma ({error}): give another file"
            ) from error

    def _check_images(self) -> tuple[int, int, int]:
        """Return number, height and width of the images; raise UserError that says how to convert others."""
        shape, dtype, self._start = self._header(self._IMAGES)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise UserError(
                f"{self.path}: {self._IMAGES} is {dtype} of shape {shown(shape)}, images are uint8 of shape (N, height,"
                f" width, 3), from 0 to 255: {self._remedy(shape, dtype)}"
            )
        return shape[0], shape[1], shape[2]

    def _remedy(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
        """Say how images of another type or shape are converted; their first values tell from which range."""
        if dtype.kind not in "fiub" or len(shape) not in (3, 4):
            return "give another file"
        low, high = 0.0, 255.0
        if dtype.kind == "f":
            with self._archive.open(f"{self._IMAGES}.npy") as file:
                file.seek(self._start)
                content = file.read(min(math.prod(shape) * dtype.itemsize, _PEEKED // dtype.itemsize * dtype.itemsize))
            values = np.frombuffer(content, dtype)
            if not np.isfinite(values).all():
                return "its first values are not all finite, give another file"
            low, high = float(values.min()), float(values.max())
        code = "x"
        if len(shape) == 4 and shape[3] not in (1, 3, 4) and shape[1] in (1, 3, 4):
            code, shape = f"{code}.transpose(0, 2, 3, 1)", (shape[0], *shape[2:], shape[1])
        if len(shape) == 3:
            code, shape = f"{code}[..., None]", (*shape, 1)
        if shape[3] not in (1, 3, 4):
            return "give another file"
        code = {1: f"{code}.repeat(3, axis=3)", 3: code, 4: f"{code}[..., :3]"}[shape[3]]
        if dtype.kind == "f":
            scaled = f"({code} + 1) * 127.5" if low < 0 else f"{code} * 255" if high <= 1 else code
            code = f"({scaled}).round().clip(0, 255)" if scaled != "x" else "x.round().clip(0, 255)"
        code += "" if dtype == np.uint8 else ".astype('uint8')"
        values_are = f" (its first values are from {low:.3g} to {high:.3g})" if dtype.kind == "f" else ""
        return f"with x = that array, save np.savez('images.npz', {code}) and give that{values_are}"

    def _header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """Return an array's shape, type and beginning; raise ValueError if it has no numbers, or is too short."""
        with self._archive.open(f"{name}.npy") as file:
            shape, dtype = read_array_header(file)
            if dtype.hasobject or not shape or not all(shape):
                raise ValueError(f"{name} is {dtype} of shape {shown(shape)}")
            if math.prod(shape) * dtype.itemsize > self._archive.getinfo(f"{name}.npy").file_size:
                raise ValueError(f"{name} is too short for {shown(shape)}")
            return shape, dtype, file.tell()

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Read these numbers from the archive."""
        height, width = self.size
        images = np.empty((len(numbers), height, width, 3), np.uint8)
        for image, number in zip(images, numbers, strict=True):
            try:
                content = self._content(number, image.nbytes)
            except _DAMAGE as error:
                self._file = None  # the next read begins anew
                raise UserError(f"{self.key}={self.path}: image {number} is damaged ({error})") from error
            if len(content) < image.nbytes:
                raise UserError(f"{self.key}={self.path} ends within image {number}: it was cut short")
            image[:] = np.frombuffer(content, np.uint8).reshape(image.shape)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def _content(self, number: int, size: int) -> bytes:
        """Return the bytes of an image; of a packed archive, nothing is unpacked twice on the way forwards."""
        if self._file is None:
            self._file, self._begin = self._open_images()
        at = self._begin + self._start + number * size
        if self._file.tell() != at:
            self._file.seek(at)
        return self._file.read(size)

    def _open_images(self) -> tuple[IO[bytes], int]:
        """Return a file, and where in it the images' array begins.

        The array of an archive that is not packed is read from the archive itself: zipfile would read all that it
        skips, and several processes skip much.
        """
        member = self._archive.getinfo(f"{self._IMAGES}.npy")
        packed = self._archive.open(member)  # which checks the header before the array, and refuses what is encrypted
        if member.compress_type != zipfile.ZIP_STORED:
            return packed, 0
        file = open_regular(self.path)
        file.seek(member.header_offset + 26)
        lengths = file.read(4)  # of the name and of the extra field, which stand between the header and the array
        name, extra = (int.from_bytes(lengths[half : half + 2], "little") for half in (0, 2))
        return file, member.header_offset + 30 + name + extra

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
            stored, dtype, start = self._header(name)
            if dtype.str[1:] not in ("f8", "f4"):
                raise ValueError(f"{name} is {dtype} of shape {shown(stored)}")
            if stored != shape:
                raise ValueError(f"it has shape {stored}, the features ask for {shape}")
            with self._archive.open(f"{name}.npy") as file:
                file.seek(start)
                content = file.read(math.prod(shape) * dtype.itemsize)
            numbers = np.frombuffer(content, dtype).astype(np.float64)
            if not np.isfinite(numbers).all():
                raise ValueError("not all of it is finite")
            tensor = torch.from_numpy(numbers.reshape(shape))
            if len(shape) == 2 and not torch.allclose(tensor, tensor.T, rtol=1e-4, atol=1e-8):
                raise ValueError("a covariance is symmetric, this is not")
            if len(shape) == 2 and tensor.diagonal().min() < 0:
                raise ValueError("a covariance has no negative variances, this has")
        except (ValueError, *_DAMAGE) as error:
            raise UserError(f"{self.key}={self.path}: {name} cannot be used: {error}") from error
        return tensor

    def described(self) -> dict[str, Any]:
        """Identify the images and statistics by the checksums in the archive."""
        names = [self._IMAGES, *(name for pair in self._MOMENTS.values() for name in pair)]
        checksums = [self._archive.getinfo(f"{name}.npy").CRC for name in names if name in self._names]
        return {"kind": "npz", "content": " ".join(f"{checksum:08x}" for checksum in checksums)}
