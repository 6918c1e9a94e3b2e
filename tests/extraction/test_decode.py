"""Image files of every kind, as users have them."""

import io

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcdit.extraction.decode import UnusableImageError, adm_crop, decode_image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width=40, height=30) -> Image.Image:
    """Red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 100)], axis=-1).astype(np.uint8))


def test_rgb_of_the_right_size_is_unchanged():
    image = gradient(16, 16)
    assert np.array_equal(decode_image(encoded(image), 16), np.asarray(image))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([8, 16, 33]))
def test_any_size_becomes_a_square(width, height, size):
    image = np.asarray(adm_crop(Image.new("RGB", (width, height), (10, 200, 30)), size))
    assert image.shape == (size, size, 3)
    assert (image == (10, 200, 30)).all()


def test_the_crop_is_the_middle():
    image = Image.new("RGB", (300, 100), "black")
    image.paste((255, 0, 0), (100, 0, 200, 100))  # the square in the middle
    pixels = decode_image(encoded(image), 25)
    assert (pixels[:, 2:-2] == (255, 0, 0)).all()


def test_halving_averages_boxes():
    """A fine chequerboard becomes grey, not one of its colours."""
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    pixels = decode_image(encoded(Image.fromarray(board.astype(np.uint8))), 16)
    assert np.abs(pixels.astype(int) - 128).max() <= 1


OLD_PILLOW = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 12 cannot read what it wrote")


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", pytest.param("YCbCr", marks=OLD_PILLOW), "RGBA", "LA", "I;16"])
def test_colour_modes(mode):
    picture = gradient(32, 32)
    if mode == "I;16":
        values = (np.asarray(picture.convert("L")).astype(np.uint16)) * 257
        content, expected = encoded(Image.fromarray(values)), picture.convert("L").convert("RGB")
    else:
        image = picture.convert(mode)
        kind = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
        content, expected = encoded(image, kind), image.convert("RGB")
    pixels = decode_image(content, 32)
    assert pixels.shape == (32, 32, 3)
    assert np.abs(pixels.astype(int) - np.asarray(expected).astype(int)).max() <= 2


def test_jpeg_in_cmyk():
    pixels = decode_image(encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"), 16)
    assert np.abs(pixels.astype(int).mean(axis=(0, 1)) - (254, 0, 0)).max() < 5


def test_sixteen_bits_are_scaled_even_where_dark():
    values = np.full((8, 8), 200, np.uint16)  # almost black
    assert decode_image(encoded(Image.fromarray(values)), 8).max() <= 1


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decode_image(encoded(image), 8) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (decode_image(encoded(palette), 8) == (255, 0, 0)).all()
    assert (decode_image(encoded(palette, transparency=1), 8) == 255).all()


def test_exif_rotation_is_applied():
    upright = gradient(40, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    pixels = decode_image(encoded(turned, "TIFF", exif=exif), 40)
    assert np.array_equal(pixels, np.asarray(upright))


def test_thin_strips_are_handled_or_refused():
    strip = encoded(Image.new("RGB", (1, 20_000), (9, 9, 9)))
    assert (decode_image(strip, 64) == 9).all()
    with pytest.raises(UnusableImageError, match="1 x 20000 pixels, min_side=2"):
        decode_image(strip, 64, min_side=2)


WHOLE = encoded(gradient())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (WHOLE[: len(WHOLE) // 2], "corrupt image"),
        (encoded(gradient(), "JPEG")[:-300], "corrupt image"),
    ],
)
def test_unusable_files_say_why(content, reason):
    with pytest.raises(UnusableImageError, match=reason):
        decode_image(content, 16)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnusableImageError, match="decompression bomb"):
        decode_image(encoded(gradient()), 16)
