"""Files of every kind: upright, bounded in memory, and one clear line where they are broken."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import subprocess
import tracemalloc
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import pocketvlm
from pocketvlm.errors import InputError
from pocketvlm.image_file import image_size, open_image


def noise(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """A seeded picture of independent pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "ppm", "webp"])
def test_lossless_formats_come_back_as_they_were(tmp_path, suffix):
    file = tmp_path / f"p.{suffix}"
    image = noise(0) if suffix != "gif" else noise(0).quantize(16)
    image.save(file, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(open_image(file).convert("RGB"), image.convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_cameras_is_applied(tmp_path, orientation):
    upright = noise(0, (5, 3))
    undo = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
    }
    exif = Image.Exif()
    exif[274] = orientation
    file = tmp_path / "p.png"
    undo[orientation](upright).save(file, exif=exif)
    assert np.array_equal(open_image(file), upright)


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    values = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    file = tmp_path / "p.png"
    Image.fromarray(values).save(file)
    assert np.asarray(open_image(file)).tolist() == [[0, 0, 1, 156, 255]]


def test_transparency_is_kept_for_the_preprocessor(tmp_path):
    file = tmp_path / "p.png"
    Image.new("RGBA", (3, 3), (1, 2, 3, 0)).save(file)
    assert open_image(file).mode == "RGBA"


def test_float_pixels_are_an_error(tmp_path):
    file = tmp_path / "p.tiff"
    Image.new("F", (3, 3), 0.5).save(file)
    with pytest.raises(InputError, match="use 8 or 16 bits"):
        open_image(file)


def test_missing_folder_and_text_files_are_errors(tmp_path):
    text = tmp_path / "p.jpg"
    text.write_text("not a picture")
    for path, message in (
        (tmp_path / "none.png", "is missing"),
        (tmp_path, "is not a regular file"),
        (text, "not a picture"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            open_image(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "bmp", "webp", "tiff"])
def test_truncated_files_are_errors(tmp_path, suffix):
    file = tmp_path / f"p.{suffix}"
    noise(0).save(file)
    whole = file.read_bytes()
    for share in (0, 0.02, 0.3, 0.7):
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError):
            open_image(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


@settings(deadline=None, max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_damage_is_read_or_refused_but_never_a_crash(folder, data, kind):
    stream = io.BytesIO()
    noise(1, (13, 9)).save(stream, kind)
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    file = folder / "p"
    file.write_bytes(content)
    with contextlib.suppress(InputError):
        image = open_image(file, max_pixels=2**20)
        assert image.width * image.height <= 2**20


def test_bomb_is_refused_before_it_is_decoded(tmp_path):
    stream = io.BytesIO()
    noise(0).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = struct.pack(">II", 20_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    png = tmp_path / "bomb.png"
    png.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"178,956,970 pixels; allowed are 67,108,864"):
        open_image(png)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_large_picture_other_than_jpeg_is_refused(tmp_path):
    file = tmp_path / "large.png"
    noise(0, (300, 200)).save(file)
    assert open_image(file, max_pixels=60_000).size == (300, 200)
    with pytest.raises(InputError, match=r"300 x 200 pixels; allowed are 59,999 in all"):
        open_image(file, max_pixels=59_999)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpeg_is_decoded_at_a_fraction(tmp_path, mode):
    file = tmp_path / "large.jpg"
    Image.linear_gradient("L").resize((800, 640)).convert(mode).save(file)
    assert open_image(file, max_pixels=800 * 640).size == (800, 640)
    assert open_image(file, max_pixels=800 * 640 - 1).size == (400, 320)
    small = open_image(file, max_pixels=80 * 100)
    assert small.size == (100, 80)
    whole = open_image(file).convert("L").resize((100, 80), Image.Resampling.BOX)
    assert np.abs(np.asarray(small.convert("L"), int) - np.asarray(whole, int)).max() <= 3
    with pytest.raises(InputError, match=r"800 x 640 pixels; allowed are 7,000"):
        open_image(file, max_pixels=7_000)


def test_jpeg_that_claims_to_be_huge_is_refused(tmp_path):
    stream = io.BytesIO()
    noise(0).save(stream, "JPEG")
    content = bytearray(stream.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 20_000, 20_000)
    file = tmp_path / "p.jpg"
    file.write_bytes(content)
    with pytest.raises(InputError, match="more than 178,956,970 pixels"):
        open_image(file)


def grey_tiff(values, sample_format, bits):
    """A TIFF file of one row, written by hand: Pillow writes no unsigned 32-bit greys."""
    data = values.tobytes()
    tags = [
        (256, 4, values.size),
        (257, 4, 1),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, 1),
        (279, 4, len(data)),
        (339, 3, sample_format),
    ]
    directory = struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        directory += struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("int32", [0, 7, 255], [0, 7, 255]),
        ("int32", [0, 511, 1023], [0, 127, 255]),
        ("int32", [0, 256, 65535], [0, 1, 255]),
        ("int32", [0, 2**30, 2**31 - 1], [0, 128, 255]),
        ("uint32", [0, 2**31, 2**32 - 1], [0, 128, 255]),
        ("uint32", [0, 3, 200], [0, 3, 200]),
        ("int16", [0, 5, 250], [0, 5, 250]),
        ("int16", [0, 2**14, 2**15 - 1], [0, 128, 255]),
        ("uint16", [0, 9, 255], [0, 9, 255]),
        ("uint16", [0, 300, 511], [0, 1, 1]),  # sixteen bits are declared: a dark picture is dark
    ],
)
def test_wide_greys_of_a_tiff_are_neither_black_nor_white(tmp_path, kind, values, expected):
    file = tmp_path / "p.tiff"
    sample_format, bits = (2 if kind[0] == "i" else 1), int(kind[-2:])
    file.write_bytes(grey_tiff(np.array([values], kind), sample_format, bits))
    assert np.asarray(open_image(file)).tolist() == [expected]


def test_negative_greys_are_refused(tmp_path):
    file = tmp_path / "p.tiff"
    file.write_bytes(grey_tiff(np.array([[-1, 5]], "int32"), 2, 32))
    with pytest.raises(InputError, match="negative pixels have no defined range"):
        open_image(file)


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_texts_of_a_png_may_be_of_any_length(tmp_path, kind, at_the_end):
    text = "x" * 3_000_000
    chunk = {
        "tEXt": b"workflow\0" + text.encode(),
        "zTXt": b"workflow\0\0" + zlib.compress(text.encode()),
        "iTXt": b"workflow\0\1\0\0\0" + zlib.compress(text.encode()),
    }[kind]
    stream = io.BytesIO()
    noise(3).save(stream, "PNG")
    content = stream.getvalue()
    place = len(content) - 12 if at_the_end else 33
    framed = kind.encode() + chunk
    framed = struct.pack(">I", len(chunk)) + framed + struct.pack(">I", zlib.crc32(framed))
    file = tmp_path / "p.png"
    file.write_bytes(content[:place] + framed * 40 + content[place:])
    assert np.array_equal(open_image(file), noise(3))
    assert image_size(file) == noise(3).size


def test_a_png_of_nothing_but_chunks_is_refused_in_bounded_time(tmp_path):
    stream = io.BytesIO()
    noise(3).save(stream, "PNG")
    content = stream.getvalue()
    empty = b"\0\0\0\0abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
    file = tmp_path / "p.png"
    file.write_bytes(content[:33] + empty * 300_000 + content[33:])
    with pytest.raises(InputError, match="damaged or truncated: more than 262,144 chunks"):
        open_image(file)


def test_orientation_in_the_text_of_a_png_is_applied(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    file = tmp_path / "p.png"
    noise(0, (5, 3)).save(file, pnginfo=texts)
    assert open_image(file).size == image_size(file) == (3, 5)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("suffix", ["jpg", "png", "eps", "tiff"])
def test_postscript_starts_nothing_under_any_name(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(os, "system", mock.Mock(side_effect=AssertionError))
    file = tmp_path / f"photo.{suffix}"
    for content in (EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 12, len(EPS)) + EPS):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"not a picture in a format .* allowed are JPEG, PNG"):
            open_image(file)
        with pytest.raises(InputError, match="not a picture"):
            image_size(file)


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICO", "SGI", "MSP", "XBM", "SPIDER", "DDS"])
def test_formats_that_nobody_needs_are_refused(tmp_path, kind):
    file = tmp_path / "photo.jpg"
    mode = {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, "RGB")
    stream = io.BytesIO()  # SPIDER's writer claims the suffix of a named file for itself, for good
    Image.new(mode, (16, 16)).save(stream, kind)
    file.write_bytes(stream.getvalue())
    with pytest.raises(InputError, match="not a picture"):
        open_image(file)


def test_a_phones_own_format_is_named(tmp_path):
    file = tmp_path / "IMG_1.HEIC"
    file.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(InputError, match="is a HEIF picture.*save it as JPEG"):
        open_image(file)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "p.jpg")
    with pytest.raises(InputError, match="is not a regular file"):
        open_image(tmp_path / "p.jpg")


def test_nothing_else_opens_pictures():
    root = Path(pocketvlm.__file__).parent
    sources = [*root.rglob("*.py"), *(root.parent / "benchmarks").glob("*.py")]
    opening = re.compile(r"\bImage\.open\b|from PIL\.Image import .*\bopen\b|\bload_image\b")
    found = {file for file in sources if opening.search(file.read_text(encoding="utf-8"))}
    assert found == {root / "image_file.py"}
