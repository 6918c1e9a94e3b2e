"""Image files of every kind, as users have them."""

import io
import struct
import subprocess
import zlib

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from support.configs import compose_config

from dcdit.errors import UserError
from dcdit.extraction.decode import FORMATS, MAX_PIXELS, UnusableImageError, adm_crop, decode_image


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
    with pytest.raises(UnusableImageError, match=r"more than max_pixels=64000000 pixels"):
        decode_image(encoded(gradient()), 16)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(x) print\n%%EOF\n"
Image.init()


@pytest.mark.parametrize("kind", sorted(set(Image.SAVE) - {*FORMATS, "MPO"}))  # MPO is several JPEGs in a file
def test_formats_that_are_not_listed_are_not_decoded(kind, monkeypatch):
    """Pillow would start Ghostscript for EPS, whatever the file is called."""
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: pytest.fail(f"starts {arguments}"))
    buffer = io.BytesIO()
    try:
        gradient(16, 16).save(buffer, kind)
    except (KeyError, OSError, ValueError):  # of another mode, or not built in
        buffer = io.BytesIO(EPS)
    with pytest.raises(UnusableImageError, match=r"not an image \(JPEG, PNG, "):
        decode_image(buffer.getvalue(), 16)


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_formats_that_are_listed_are_decoded(kind):
    if kind not in Image.SAVE:
        pytest.skip("not built into this Pillow")
    assert decode_image(encoded(gradient(16, 16), kind), 16).shape == (16, 16, 3)


GIF = encoded(gradient().convert("P"), "GIF")


@pytest.mark.parametrize(
    "content",
    [
        png(60_000, 60_000, 1, 0, b"\0"),
        png(13_000, 13_000, 8, 2, b"\0"),
        png(8001, 8001, 8, 0, b"\0"),
        GIF[:6] + struct.pack("<HH", 60_000, 60_000) + GIF[10:],
        GIF[:6] + struct.pack("<HH", 9000, 9000) + GIF[10:],
        b"P5 60000 60000 255\n" + bytes(100),
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 1000, 0, 54, 40, 10_000, 10_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100),
    ],
)
def test_large_images_are_refused_before_they_are_decoded(content, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decodes"))
    with pytest.raises(UnusableImageError, match=r"pixels, max_pixels=64000000|more than max_pixels=64000000 pixels"):
        decode_image(content, 16)


def test_the_limit_of_pixels_can_be_set():
    assert compose_config("source=x", "out=y", name="extract").max_pixels == MAX_PIXELS
    content = encoded(gradient(20, 10))
    assert decode_image(content, 8, max_pixels=200).shape == (8, 8, 3)
    with pytest.raises(UnusableImageError, match="20 x 10 pixels, max_pixels=199"):
        decode_image(content, 8, max_pixels=199)


def test_too_little_memory_is_no_fault_of_an_image(monkeypatch):
    def fail(image):
        raise MemoryError

    monkeypatch.setattr("dcdit.extraction.decode.to_rgb", fail)
    with pytest.raises(UserError, match="too little memory to decode it: lower max_pixels"):
        decode_image(WHOLE, 16)


def text_of(size: int, compressed: bool) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * size, zip=compressed)
    return info


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"pnginfo": text_of(3_000_000, True)},
        {"pnginfo": text_of(3_000_000, False)},
        {"icc_profile": b"x" * 3_000_000},
        {"icc_profile": b"no profile"},
    ],
)
def test_the_pixels_count_whatever_texts_and_profiles_are_beside_them(options, turned):
    picture, exif = gradient(16, 16), Image.Exif()
    if turned:
        exif[0x0112] = 3
    content = encoded(picture, exif=exif, **options)
    expected = np.asarray(picture.rotate(180) if turned else picture)
    assert np.array_equal(decode_image(content, 16), expected)
    damaged = content.replace(b"iCCP", b"iCCq").replace(b"zTXt", b"zTXu").replace(b"tEXt", b"tEXu")
    assert damaged != content  # its checksums are wrong now
    assert np.array_equal(decode_image(damaged, 16), expected)


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 1, "a description"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(EXIF.tobytes()) - 1), st.integers(1, 255), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_damaged_exif_data_lose_no_image(place, bits, kind):
    exif = bytearray(EXIF.tobytes())
    exif[place] ^= bits
    assert decode_image(encoded(gradient(16, 16), kind, exif=bytes(exif)), 16).shape == (16, 16, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_no_black_picture(value):
    values = np.full((8, 8), 0.5, np.float32)
    assert (decode_image(encoded(Image.fromarray(values), "TIFF"), 8) == 128).all()
    values[3, 4] = value
    with pytest.raises(UnusableImageError, match="not all of its values are finite"):
        decode_image(encoded(Image.fromarray(values), "TIFF"), 8)


@pytest.mark.parametrize(("depth", "colour"), [(8, 0), (16, 0), (8, 2), (16, 2)])
@pytest.mark.parametrize("transparent", [True, False])
def test_a_transparent_colour_is_laid_on_white_at_any_depth(depth, colour, transparent):
    samples = 1 if colour == 0 else 3
    values = (0x20, 0x30, 0x40)[:samples] if depth == 8 else (0x2011, 0x3011, 0x4011)[:samples]
    pixel = struct.pack(f">{samples}{'B' if depth == 8 else 'H'}", *values)
    key = chunk(b"tRNS", struct.pack(f">{samples}H", *values)) if transparent else b""
    pixels = decode_image(png(8, 8, depth, colour, (b"\0" + pixel * 8) * 8, key), 8)
    assert (pixels == ((255,) * 3 if transparent else (0x20, 0x30, 0x40) if colour else (0x20,) * 3)).all()
