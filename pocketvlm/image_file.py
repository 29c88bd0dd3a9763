"""Picture files as an app receives them: a few formats, upright, in bounded memory.

A file is read as a person sees it: the EXIF orientation of phone cameras is applied (as Hugging
Face's file loader does; its image processors, and `ImagePreprocessor`, take pixels as they are).
Transparency is kept; the preprocessor composites it onto white. Colour profiles are ignored.

Pillow would try more than forty formats on any file, whatever its name says: one of them starts
Ghostscript, others are unmaintained. Only `FORMATS` are tried here, and nothing else in this
package opens a picture.

Greys of more than eight bits: a format that declares sixteen bits keeps the upper eight (Pillow's
own conversion would clip them to white), unless every value fits into eight bits, which are then
taken as they are, as Pillow does. A TIFF file of 32-bit whole numbers declares no range that is
ever filled: its range is the number of bits that its largest value needs.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pocketvlm.errors import InputError
from pocketvlm.files.reader import read_bytes

__all__ = [
    "FORMATS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "image_size",
    "open_image",
    "read_image",
    "to_rgb",
]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""What is read: what phones and the web make, and what data sets are kept in."""

MAX_PIXELS = 2**26
"""The most pixels that are decoded: 8192 x 8192, or 192 MiB as RGB."""

MAX_FILE_BYTES = 2**29
"""The largest picture file that is read: `MAX_PIXELS` uncompressed, at 16 bits per channel, fit."""

_ORIENTATION, _SAMPLE_FORMAT = 274, 339  # tags of EXIF and TIFF
_TURNED = (5, 6, 7, 8)  # orientations that exchange width and height
_CHANNEL_BITS = 8
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_KEPT_CHUNK = 2**16
_MAX_CHUNKS = 2**18  # in a PNG file; each costs the reader time, however small it is
# Where Pillow finds an orientation if a picture has no EXIF block.
_KEPT_KEYWORDS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")


def open_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a picture file: upright, decoded, eight bits per channel.

    A JPEG beyond `max_pixels` is decoded at 1/2, 1/4 or 1/8 of its size, which its format allows
    without ever holding the whole picture; every other format is refused beyond it.

    Args:
        path: The file; of an animation, the first frame is taken.
        max_pixels: Pixels that may be decoded.

    Raises:
        InputError: The file is missing, not a picture, damaged, truncated or too large.
    """
    return read_image(_content(path), str(path), max_pixels=max_pixels)


def read_image(content: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Like `open_image`, for a file that is already in memory.

    Args:
        content: The file's bytes.
        where: Where they come from, for messages.
        max_pixels: Pixels that may be decoded.

    Raises:
        InputError: As `open_image`.
    """
    with _opened(content, where, max_pixels) as image:
        _bound(image, where, max_pixels)
        image.load()
        return _eight_bits(ImageOps.exif_transpose(image), image, where)


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the upright picture, without decoding it.

    Raises:
        InputError: As `open_image`, as far as the header shows.
    """
    with _opened(_content(path), str(path), max_pixels) as image:
        width, height = image.size
        _bound(image, str(path), max_pixels)
        # A PNG picture's own method would decode the pixels to find a block after them.
        orientation = Image.Image.getexif(image).get(_ORIENTATION)
        return (height, width) if orientation in _TURNED else (width, height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB; what is transparent shows white, as in Hugging Face."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _content(path: Path) -> bytes:
    return read_bytes(path, error=InputError, max_bytes=MAX_FILE_BYTES)


@contextmanager
def _opened(content: bytes, where: str, max_pixels: int) -> Iterator[Image.Image]:
    """Opens a picture; whatever goes wrong with it inside the block becomes one line."""
    Image.init()  # some builds of Pillow lack a format
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes, which `max_pixels` decides, and of damaged metadata, which a
            # picture does not need; damaged pixels are errors anyway.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(_without_texts(content)), formats=formats) as image:
                yield image
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(
            f"{where}: the picture has more than {limit:,} pixels; allowed are {max_pixels:,}, "
            f"in a JPEG file up to {limit:,}"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{where}: {_unknown(content, formats)}") from error
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{where}: the picture does not fit into memory") from error
    except Exception as error:  # decoders raise anything on damaged files, TypeError included
        first_line = str(error).partition("\n")[0]
        raise InputError(f"{where}: the picture is damaged or truncated: {first_line}") from error


def _unknown(content: bytes, formats: list[str]) -> str:
    allowed = f"allowed are {', '.join(formats)}"
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        return (
            f"is a HEIF picture, whose codec cannot be shipped freely; save it as JPEG ({allowed})"
        )
    return f"not a picture in a format that is read, or its header is damaged; {allowed}"


def _without_texts(content: bytes) -> bytes:
    """Drops the texts and the colour profile of a PNG file, which are not needed.

    Tools store whole workflows in text chunks. Pillow expands them while it opens the file, and
    reports long ones as damage.
    """
    if not content.startswith(_PNG_SIGNATURE):
        return content
    kept: list[bytes | memoryview] = [_PNG_SIGNATURE]
    chunks = 0
    view, place = memoryview(content), len(_PNG_SIGNATURE)
    while place + 8 <= len(content):
        length = int.from_bytes(view[place : place + 4])
        kind = bytes(view[place + 4 : place + 8])
        chunks += 1
        if chunks > _MAX_CHUNKS:
            raise ValueError(f"more than {_MAX_CHUNKS:,} chunks")
        after = place + 12 + length
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or (
            length <= _MAX_KEPT_CHUNK
            and bytes(view[place + 8 : place + 40]).startswith(_KEPT_KEYWORDS)
            and kind != b"zTXt"
        ):
            kept.append(view[place:after])
        place = after
        if kind == b"IEND":
            break
    return b"".join(kept)


def _bound(image: Image.Image, where: str, max_pixels: int) -> None:
    """Has a large JPEG decoded at a fraction of its size, and refuses other large files."""
    width, height = image.size
    if width * height <= max_pixels:
        return
    for scale in (2, 4, 8):
        if (width // scale) * (height // scale) <= max_pixels:
            # Only the JPEG reader obeys; the others leave the size as it is.
            image.draft(image.mode, (max(width // scale, 1), max(height // scale, 1)))
            break
    if image.width * image.height > max_pixels:
        raise InputError(
            f"{where}: {width:,} x {height:,} pixels; allowed are {max_pixels:,} in all "
            f"(a JPEG file may have more)"
        )


def _eight_bits(upright: Image.Image, file: Image.Image, where: str) -> Image.Image:
    """Converts to eight bits per channel; `file` says how its greys are encoded."""
    if file.mode == "F":
        raise InputError(f"{where}: floating-point pixels have no defined range; use 8 or 16 bits")
    if file.mode != "I" and not file.mode.startswith("I;16"):
        return upright
    values = np.asarray(upright).astype(np.int64)
    declares_range = file.mode != "I" or file.format != "TIFF"
    if not declares_range and _is_unsigned(file):
        values &= 2**32 - 1  # Pillow reads them as signed
    if values.min(initial=0) < 0:
        raise InputError(f"{where}: negative pixels have no defined range; use 8 or 16 bits")
    bits = max(int(values.max(initial=0)).bit_length(), _CHANNEL_BITS)
    if declares_range and bits > _CHANNEL_BITS:
        bits = 16
    return Image.fromarray((values >> (bits - _CHANNEL_BITS)).astype(np.uint8))


def _is_unsigned(file: Image.Image) -> bool:
    tags = getattr(file, "tag_v2", {})  # only TIFF pictures have it
    return tags.get(_SAMPLE_FORMAT, (1,))[0] == 1
