"""From any image files to batches of the square RGB pixels that an autoencoder takes."""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import IterableDataset, get_worker_info

from dcdit.checks import visible
from dcdit.data.companions import encode_pixels
from dcdit.data.manifest import Skipped
from dcdit.errors import UserError
from dcdit.extraction.settings import ExtractionSettings
from dcdit.extraction.sources import ImageSource, Item, UnreadableError, UnusableImageError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
"""Formats that are decoded, in Pillow's names. Pillow knows more, and starts a program, Ghostscript, for one."""

MAX_PIXELS = 64_000_000
"""Pixels that an image has at most where nobody says otherwise: 8,000 x 8,000, up to 1.5 GB while it is decoded."""

_LONGEST = 16
"""Aspect ratio from which a source is cropped before it is enlarged, so that a thin strip cannot fill the memory."""


def decode_image(content: bytes, size: int, min_side: int = 1, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image, (size, size, 3) uint8: turned upright, converted to RGB and cropped around its centre.

    Grey, palette, CMYK and 16-bit images are converted; transparent ones are laid on white; EXIF rotation is applied.
    Metadata that cannot be read is ignored.

    Args:
        content: the file's bytes, in one of :data:`FORMATS`.
        size: side of the result.
        min_side: least number of pixels along the shorter side of the source.
        max_pixels: number of pixels that the source has at most, which is checked before they are decoded.

    Raises:
        UnusableImageError: with the reason.
        UnreadableError: if there is too little memory for it.
    """
    if not content:
        raise UnusableImageError("the file is empty")
    try:
        try:
            return _decode(content, size, min_side, max_pixels)
        except (ValueError, SyntaxError, UnidentifiedImageError):
            # Pillow refuses all of a PNG for a large or damaged text or colour profile, of which no pixel depends.
            bare = _without_text(content)
            if len(bare) == len(content):
                raise
            return _decode(bare, size, min_side, max_pixels)
    except UnidentifiedImageError:
        raise UnusableImageError(f"not an image ({', '.join(FORMATS)})") from None
    except UnusableImageError:
        raise
    except Image.DecompressionBombError:
        raise UnusableImageError(f"more than max_pixels={max_pixels} pixels") from None
    except MemoryError:
        raise UnreadableError(
            f"there is too little memory to decode it: lower max_pixels={max_pixels}, or num_workers"
        ) from None
    except Exception as error:  # decoders raise whatever a broken file provokes
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UnusableImageError(visible(f"corrupt image: {reason}")) from error


def image_size(content: bytes) -> tuple[int, int]:
    """Return height and width of an image file as it is stored; raise UnusableImageError if it is none."""
    try:
        with Image.open(io.BytesIO(_without_text(content)), formats=_formats()) as image:
            return image.height, image.width
    except Exception:  # decoders raise whatever a broken file provokes
        raise UnusableImageError(f"not an image ({', '.join(FORMATS)})") from None


def _decode(content: bytes, size: int, min_side: int, max_pixels: int) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of large images that are small enough to decode
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise UnusableImageError(f"{image.width} x {image.height} pixels, max_pixels={max_pixels}")
            if min(image.size) < min_side:
                raise UnusableImageError(f"{image.width} x {image.height} pixels, min_side={min_side}")
            image.load()
            _turn_upright(image)
            return np.array(adm_crop(to_rgb(image), size))


@cache
def _formats() -> list[str]:
    """Those of :data:`FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _turn_upright(image: Image.Image) -> None:
    """Turn an image as its metadata say; those that cannot be read say nothing."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # whatever damaged metadata provokes
        return


def _without_text(content: bytes) -> bytes:
    """A PNG with only those of its chunks on which the pixels depend; anything else as it is."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    parts, offset = [content[:8]], 8
    while offset < len(content):
        end = offset + 12 + int.from_bytes(content[offset : offset + 4], "big")
        kind = content[offset + 4 : offset + 8]
        # by the standard, capitals mark what no decoder may ignore
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):
            parts.append(content[offset:end])
        offset = end
    return b"".join(parts)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow to RGB; UnusableImageError if a value is not finite."""
    transparency = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits deep: Pillow's own conversion would clip
        values = np.array(image, np.float64)
        if not np.isfinite(values).all():
            raise UnusableImageError("not all of its values are finite numbers")
        transparent = values == transparency if isinstance(transparency, int) else None
        largest = values.max(initial=0)
        if image.mode.startswith("I;16") or largest > 255:
            values /= 257  # 65535 / 255
        elif image.mode == "F" and largest <= 1:
            values *= 255
        grey = np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8)
        if transparent is not None:
            grey[transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in transparency)  # Pillow keeps 8 bits of 16
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` and take the square in the middle, as the ADM preprocessing does.

    While the shorter side is at least twice ``size`` the image is halved by box averages; what remains is bicubic.
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
        images: (n, size, size, 3) uint8; an array, for tensors would travel as open files, which interrupts break.
        items: what the images are, by their number within the task, in the order of ``images``.
        skipped: images that could not be used.
        notes: what else is to be listed, see :class:`dcdit.extraction.sources.Listing`.
        files: how many files this batch stands for.
        problem: what must stop the extraction; None if all is well.
        jpegs: members that hold the images in the companion shard, one mapping for each; none unless they are stored.
    """

    task: int
    images: NDArray[np.uint8]
    items: dict[int, Item]
    skipped: Sequence[Skipped] = ()
    notes: Sequence[Skipped] = ()
    files: int = 0
    problem: str | None = None
    jpegs: Sequence[Mapping[str, bytes]] = ()


def as_it_is(batch: object) -> object:
    """Return ``batch``: a ``collate_fn`` for the loader, whose own would make tensors of arrays."""
    return batch


class ImageBatches(IterableDataset[Decoded]):
    """Decoded images of the ``tasks`` of a source, in order; the workers of a loader take batches in turn."""

    def __init__(self, source: ImageSource, tasks: list[int], settings: ExtractionSettings) -> None:
        super().__init__()
        self.source, self.tasks, self.settings = source, tasks, settings

    def __iter__(self) -> Iterator[Decoded]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        turn, size = 0, self.settings.batch_size
        for task in self.tasks:
            try:
                listing = self.source.items(task)
            except UserError as error:
                # Every worker meets it; the loader hears it from the one whose turn it is.
                if turn == worker:
                    yield self._stop(task, error)
                return
            for start in range(0, max(1, len(listing.items)), size):
                if turn == worker:
                    batch = self._decode(task, listing.items[start : start + size], start)
                    skipped = [*listing.skipped, *batch.skipped]
                    yield batch if start else batch._replace(skipped=skipped, notes=listing.notes)
                turn = (turn + 1) % workers

    def _stop(self, task: int, error: UserError, name: str = "") -> Decoded:
        after = ". Finished shards are kept; the same command goes on" if isinstance(error, UnreadableError) else ""
        return Decoded(task, np.empty(0, np.uint8), {}, problem=f"{name}{error}{after}")

    def _decode(self, task: int, batch: list[Item], start: int) -> Decoded:
        pixels: list[NDArray[np.uint8]] = []
        items: dict[int, Item] = {}
        skipped: list[Skipped] = []
        side, limits = self.settings.image_size, (self.settings.min_side, self.settings.max_pixels)
        for number, item in enumerate(batch, start):
            try:
                pixels.append(decode_image(self.source.read(item), side, *limits))
                items[number] = item
            except UnusableImageError as error:
                skipped.append(Skipped(item.source, str(error)))
            except UnreadableError as error:
                return self._stop(task, error, f"{item.source}: ")
        images = np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8)
        stored = pixels if self.settings.companion == "pixels" else []
        jpegs = [encode_pixels(image, self.settings.jpeg_quality) for image in stored]
        return Decoded(task, images, items, skipped, files=len(batch), jpegs=jpegs)
