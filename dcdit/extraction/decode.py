"""From any image files to batches of the square RGB pixels that an autoencoder takes."""

import io
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import IterableDataset, get_worker_info

from dcdit.data.manifest import Skipped
from dcdit.errors import UserError
from dcdit.extraction.sources import ImageSource, Item

_LONGEST = 16
"""Aspect ratio from which a source is cropped before it is enlarged, so that a thin strip cannot fill the memory."""


class UnusableImageError(Exception):
    """An image that cannot be used, with the reason."""


def decode_image(content: bytes, size: int, min_side: int = 1) -> NDArray[np.uint8]:
    """Decode, turn upright, convert to RGB and centre-crop an image.

    Grey, palette, CMYK and 16-bit images are converted; transparent ones are laid on white; EXIF rotation is applied.

    Args:
        content: the file's bytes.
        size: side of the result.
        min_side: least number of pixels along the shorter side of the source.

    Returns:
        (size, size, 3) uint8.

    Raises:
        UnusableImageError: with the reason.
    """
    if not content:
        raise UnusableImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of large images that are small enough to decode
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                if min(image.size) < min_side:
                    raise UnusableImageError(f"{image.width} x {image.height} pixels, min_side={min_side}")
                ImageOps.exif_transpose(image, in_place=True)
                return np.array(adm_crop(to_rgb(image), size))
    except UnidentifiedImageError:
        raise UnusableImageError("not an image") from None
    except UnusableImageError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a broken file provokes
        raise UnusableImageError(f"corrupt image: {str(error).splitlines()[0] if str(error) else error!r}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow to RGB."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits deep: Pillow's own conversion would clip
        values = np.asarray(image, np.float64)
        largest = values.max(initial=0)
        if image.mode.startswith("I;16") or largest > 255:
            values = values / 257  # 65535 / 255
        elif image.mode == "F" and largest <= 1:
            values = values * 255
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` and take the square in the middle, as the ADM preprocessing does.

    While the shorter side is at least twice ``size`` the image is halved by box averages; what remains is bicubic.

    Args:
        image: RGB.
        size: side of the result.
    """
    longest = _LONGEST * min(image.size)
    if max(image.size) > longest:
        image = _centre(image, min(image.width, longest), min(image.height, longest))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _centre(image, size, size)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class Decoded(NamedTuple):
    """A batch of images from a worker.

    Attributes:
        task: number of the task.
        images: (n, size, size, 3) uint8; an array, for tensors would travel as open files, which interrupts break.
        places: number of each image within its task.
        labels, sources: of each image.
        skipped: what could not be used.
        files: how many files this batch stands for.
        problem: what must stop the extraction; None if all is well.
    """

    task: int
    images: NDArray[np.uint8]
    places: list[int]
    labels: list[int]
    sources: list[str]
    skipped: list[Skipped]
    files: int
    problem: str | None = None


def as_it_is(batch: Any) -> Any:
    """For the loader's ``collate_fn``: its default would make tensors."""
    return batch


class ImageBatches(IterableDataset[Decoded]):
    """Decoded images of ``tasks`` in order; the workers of a loader take batches in turn.

    Args:
        source: the images.
        tasks: which of its tasks.
        batch_size: files of a batch.
        image_size, min_side: see :func:`decode_image`.
    """

    def __init__(self, source: ImageSource, tasks: list[int], batch_size: int, image_size: int, min_side: int) -> None:
        super().__init__()
        self.source, self.tasks = source, tasks
        self.batch_size, self.image_size, self.min_side = batch_size, image_size, min_side

    def __iter__(self) -> Iterator[Decoded]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        turn, size = 0, self.batch_size
        for task in self.tasks:
            try:
                items, skipped = self.source.items(task)
            except UserError as error:
                # Every worker meets it; the loader hears it from the one whose turn it is.
                if turn == worker:
                    yield Decoded(task, np.empty(0, np.uint8), [], [], [], [], 0, str(error))
                return
            for start in range(0, max(1, len(items)), size):
                if turn == worker:
                    yield self._decode(task, items, start, skipped if start == 0 else [])
                turn = (turn + 1) % workers

    def _decode(self, task: int, items: list[Item], start: int, skipped: list[Skipped]) -> Decoded:
        pixels: list[NDArray[np.uint8]] = []
        places, labels, sources, skipped = [], [], [], list(skipped)
        batch = items[start : start + self.batch_size]
        for place, item in enumerate(batch, start):
            try:
                pixels.append(decode_image(item.read(), self.image_size, self.min_side))
            except (UnusableImageError, OSError) as error:
                skipped.append(Skipped(item.source, getattr(error, "strerror", None) or str(error)))
                continue
            places.append(place)
            labels.append(item.label)
            sources.append(item.source)
        side = self.image_size
        images = np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8)
        return Decoded(task, images, places, labels, sources, skipped, len(batch))
