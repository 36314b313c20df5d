"""Decoding images that nobody has looked at before."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy
import pytest
from PIL import Image, ImageCms, ImageOps

from kore.errors import DataError
from kore.fetch import decode_image, image_kind, image_size, open_image
from tests.image_server import picture


def _png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_the_four_kinds(kind):
    data = picture(kind)
    decoded = decode_image(data, "a")
    assert image_kind(data) == decoded.kind == kind
    assert decoded.pixels.mode == "RGB" and decoded.pixels.size == (60, 40)
    red, _, blue = decoded.pixels.getpixel((50, 30))
    assert red > 200 and blue < 60


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "ICO"])
def test_no_other_kinds(kind):
    with pytest.raises(DataError, match="expected JPEG, PNG, WebP or GIF"):
        decode_image(picture(kind), "a")


def test_eps_behind_the_head_of_a_jpeg_is_not_run():
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(b"\xff\xd8\xff%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_images(kind):
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=numpy.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, kind)
    data = buffer.getvalue()
    decode_image(data, "a")
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(DataError, match="image a"):
            decode_image(data[: int(len(data) * share)], "a")


def test_a_bomb_is_refused_by_its_header():
    bomb = _png(60_000, 60_000, b"\0" * 1000)
    with pytest.raises(DataError, match=r"too large|the limit is"):
        decode_image(bomb, "a", max_pixels=10**7)
    with pytest.raises(DataError, match="100 x 100 pixels; the limit is 9999"):
        decode_image(_png(100, 100, b"\0" * 10100), "a", max_pixels=9999)
    with pytest.raises(DataError, match="the limit is 100"):
        decode_image(picture(), "a", max_bytes=100)


def test_upright_and_without_metadata():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret"
    exif[0x8825] = {1: "N", 2: (51.0, 30.0, 0.0)}
    data = picture("JPEG", exif=exif, comment=b"a secret")
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif().get_ifd(0x8825)
    pixels = decode_image(data, "a").pixels
    assert pixels.size == (40, 60) and dict(pixels.getexif()) == {} and pixels.info == {}
    red, _, blue = pixels.getpixel((35, 5))  # the blue corner, turned
    assert blue > 150 and red < 80


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    for kind in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        image.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
        pixels = decode_image(buffer.getvalue(), "a").pixels
        assert pixels.getpixel((3, 3)) == (255, 255, 255) and pixels.getpixel((0, 0)) == (0, 0, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    decoded = decode_image(buffer.getvalue(), "a")
    assert decoded.pixels.getpixel((3, 3)) == (255, 255, 255) and decoded.flat


def test_sixteen_bit_greys_keep_their_shade():
    grey = Image.fromarray(numpy.full((4, 4), 0x8000, dtype=numpy.uint16))
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), "a").pixels.getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_picture_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    red, _, blue = decode_image(buffer.getvalue(), "a").pixels.getpixel((4, 4))
    assert red > 240 and blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_as_pillow_turns_it(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture("PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(data)
    with Image.open(io.BytesIO(data)) as image:
        expected = numpy.asarray(ImageOps.exif_transpose(image))
    for pixels in (decode_image(data, "a").pixels, open_image(tmp_path / "a.png")):
        assert numpy.array_equal(numpy.asarray(pixels), expected) and dict(pixels.getexif()).get(0x0112) in (None, 1)
    assert image_size(tmp_path / "a.png") == expected.shape[:2]


@pytest.mark.filterwarnings("ignore")
def test_malformed_exif_does_not_cost_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = picture("JPEG", exif=exif)
    for wrong in (b"Exif\0\0XX", b"Exif\0\0MM\0\xaa", b"Exif\0\0MM\0*\xff"):
        broken = data.replace(data[data.index(b"Exif") :][: len(wrong)], wrong, 1)
        (tmp_path / "a.jpg").write_bytes(broken)
        assert decode_image(broken, "a").pixels.size == open_image(tmp_path / "a.jpg").size == (60, 40)
        assert image_size(tmp_path / "a.jpg") == (40, 60)


@pytest.mark.filterwarnings("ignore")
def test_changed_bytes_raise_nothing_but_data_errors(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text" * 9
    random, path = numpy.random.default_rng(0), tmp_path / "a.img"
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = picture(kind, **({} if kind == "GIF" else {"exif": exif}))
        for _ in range(60):
            changed = bytearray(data)
            for place in random.integers(8, min(len(data), 250), 3):
                changed[place] = random.integers(0, 256)
            path.write_bytes(changed)
            for read in (lambda path: decode_image(path.read_bytes(), "a"), open_image, image_size):
                with contextlib.suppress(DataError):
                    read(path)


def test_drawings_that_are_programs_are_not_opened(tmp_path, monkeypatch):
    drawing = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(drawing, "EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    for read in (open_image, image_size):
        with pytest.raises(DataError, match="cannot be read"):
            read(drawing)
    Image.new("RGB", (8, 6)).save(tmp_path / "a.tif")
    assert open_image(tmp_path / "a.tif").size == (8, 6)


def test_nothing_but_pixels_is_kept():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = picture("JPEG", icc_profile=profile, xmp=b"<x>a secret</x>", comment=b"a secret", dpi=(72, 72))
    assert b"ICC_PROFILE" in data and b"a secret" in data
    stored = io.BytesIO()
    decode_image(data, "a").pixels.save(stored, "JPEG")
    assert all(mark not in stored.getvalue() for mark in (b"ICC_PROFILE", b"secret", b"Exif", b"http"))
    cmyk = Image.new("CMYK", (9, 9), (0, 255, 255, 0))
    buffer = io.BytesIO()
    cmyk.save(buffer, "JPEG")
    red, green, blue = decode_image(buffer.getvalue(), "a").pixels.getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15
