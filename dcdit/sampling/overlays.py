"""What the router kept, drawn over decoded images at the resolution of their pixels, and trajectories that move."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dcdit.checks import visible
from dcdit.runtime.files import replacing

Pixels = NDArray[np.uint8]
"""An image (height, width, 3)."""

KEPT, DROPPED = (230, 159, 0), (86, 180, 233)
"""Outlines of kept positions, orange, and of those that the tail drop left out, sky blue: told apart by everyone
(Okabe and Ito's palette)."""
PROBABILITY = "magma"
"""Colours of the boundary probability, from 0 to 1 in every picture."""
_BESIDE, _SHADE = 0.45, 96.0
"""How much of an image is left beside kept positions, and the grey that the rest becomes."""


def enlarged(image: NDArray[Any], least: int) -> Pixels:
    """Return an image (height, width, 1 or 3) uint8 in colours, enlarged to at least ``least`` rows, pixels sharp."""
    factor = max(1, -(-least // image.shape[0]))
    large = image.repeat(factor, 0).repeat(factor, 1)
    return np.broadcast_to(large, (*large.shape[:2], 3)).copy()


def fitted(image: NDArray[Any], least: int, most: int = 512) -> Pixels:
    """Return an image as :func:`enlarged` does, or averaged down to ``most`` rows: many stand in one picture."""
    large = enlarged(image, least)
    if large.shape[0] <= most:
        return large
    width = max(1, round(large.shape[1] * most / large.shape[0]))
    return np.asarray(Image.fromarray(large).resize((width, most), Image.Resampling.BOX))


def spread(grid: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Return the value of a ``grid`` (H, W) at each pixel, (height, width)."""
    rows = np.arange(height) * grid.shape[0] // height
    columns = np.arange(width) * grid.shape[1] // width
    return grid[rows][:, columns]


def _outline(image: Pixels, grid: NDArray[np.bool_], colour: tuple[int, int, int]) -> None:
    """Draw, within ``image``, the inner border of the positions in ``grid`` (H, W), neighbours as one."""
    inside = spread(grid, *image.shape[:2])
    thickness = max(1, image.shape[0] // 96)
    around = np.pad(inside, thickness)
    height, width = inside.shape
    whole = inside.copy()
    for down in (0, thickness, 2 * thickness):
        for right in (0, thickness, 2 * thickness):
            whole &= around[down : down + height, right : right + width]
    image[inside & ~whole] = colour


def overlay(image: Pixels, kept: NDArray[np.bool_], natural: NDArray[np.bool_]) -> Pixels:
    """Return ``image`` with the positions that were ``kept`` (H, W) clear and outlined, and the others shaded.

    Where none was kept, all features were reused: nothing is outlined, for nothing was dropped either.

    Args:
        image: (height, width, 3).
        kept: positions that ran.
        natural: those that the router kept by itself; where they did not run, the tail drop left them out.
    """
    clear = spread(kept, *image.shape[:2])[..., None]
    drawn = np.where(clear, image, _BESIDE * image + (1 - _BESIDE) * _SHADE).astype(np.uint8)
    if kept.any():
        _outline(drawn, natural & ~kept, DROPPED)
        _outline(drawn, kept, KEPT)
    return drawn


def probabilities(prob: NDArray[Any], kept: NDArray[np.bool_], height: int, width: int) -> Pixels:
    """Return the boundary probability ``prob`` (H, W) as colours (height, width, 3), the kept positions outlined."""
    from matplotlib import colormaps

    drawn = (colormaps[PROBABILITY](spread(prob, height, width))[..., :3] * 255).round().astype(np.uint8)
    _outline(drawn, kept, (255, 255, 255))
    return drawn


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own font: it is always there, and has ρ."""
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


_SIZE = 18
"""Of letters, in pixels."""


def side_by_side(panels: Sequence[tuple[str, Pixels]], title: str = "", least: int = 256) -> Pixels:
    """Draw panels of one height beside each other, the caption of each above it, a title above all, on white.

    Args:
        panels: caption and picture of each.
        title: nothing leaves it out; what is too long goes on in a second line.
        least: side that smaller pictures are enlarged to.
    """
    pictures = [enlarged(picture, least) for _, picture in panels]
    gap, line = 8, 27
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) + 1)
    lines = _lines(title, width - 2 * gap)
    top = gap + line * (len(lines) + 1)
    canvas = Image.new("RGB", (width, top + max(picture.shape[0] for picture in pictures) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(lines):
        draw.text((gap, gap // 2 + number * line), visible(text), "black", _font(_SIZE))
    left = gap
    for (caption, _), picture in zip(panels, pictures, strict=True):
        draw.text((left, top - line), visible(caption), "#333333", _font(_SIZE))
        canvas.paste(Image.fromarray(picture), (left, top))
        left += picture.shape[1] + gap
    return np.asarray(canvas)


def _lines(text: str, width: int) -> list[str]:
    """Return ``text`` in lines of at most ``width`` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(_SIZE).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_animation(frames: Sequence[Pixels], path: Path, milliseconds: int = 160, last: int = 1600) -> None:
    """Save ``frames`` of one size as a GIF or WebP, as ``path`` ends, that repeats.

    Args:
        frames: at least one.
        milliseconds: how long each is shown.
        last: how long the last one is shown, in milliseconds.
    """
    first, *others = [Image.fromarray(frame) for frame in frames]
    durations = [milliseconds] * len(others) + [last]
    options = {"format": "WEBP", "lossless": True, "method": 6} if path.suffix == ".webp" else {"format": "GIF"}
    with replacing(path) as file:
        first.save(file, save_all=True, append_images=others, duration=durations, loop=0, **options)
