"""Picture files as an app receives them: any format, upright, within bounded memory.

A file is read as a person sees it: the EXIF orientation of phone cameras is applied (Hugging
Face's file loader does the same; its image processors, and `ImagePreprocessor`, take pixels as
they are), and 16-bit greys keep their upper eight bits (Pillow's own conversion would clip them
to white). Transparency is kept; the preprocessor lays it on white. Colour profiles are ignored.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pocketvlm.errors import InputError

__all__ = ["MAX_PIXELS", "open_image"]

MAX_PIXELS = 2**26
"""Pixels that are decoded at once: 8192 x 8192, or 192 MiB as RGB."""


def open_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a picture, upright, decoded, with eight bits a channel.

    A JPEG beyond `max_pixels` is decoded at 1/2, 1/4 or 1/8 of its size, which its format allows
    without ever holding the whole; every other format is refused beyond it.

    Args:
        path: The file; of an animation, the first frame is taken.
        max_pixels: Pixels that may be decoded.

    Raises:
        InputError: The file is missing, is no picture, is damaged or truncated, or is too large.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes, which `max_pixels` decides, and of damaged metadata, which a
            # picture can do without; damaged pixels are errors all the same.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                _bound(image, path, max_pixels)
                image.load()
                return _eight_bits(ImageOps.exif_transpose(image), path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder, not a picture") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(
            f"{path}: the picture has more than {limit:,} pixels; allowed are {max_pixels:,}, "
            f"in a JPEG file up to {limit:,}"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a picture in a format that Pillow reads") from error
    except InputError:
        raise
    except Exception as error:  # decoders raise anything on damaged files, TypeError included
        first_line = str(error).partition("\n")[0]
        raise InputError(f"{path}: the picture is damaged or truncated: {first_line}") from error


def _bound(image: Image.Image, path: Path, max_pixels: int) -> None:
    """Has a large JPEG decoded at a fraction of its size, and refuses other large files."""
    width, height = image.size
    if width * height <= max_pixels:
        return
    for scale in (2, 4, 8):
        if (width // scale) * (height // scale) <= max_pixels:
            # Only JPEG's reader follows; every other one leaves the size as it is.
            image.draft(image.mode, (max(width // scale, 1), max(height // scale, 1)))
            break
    if image.width * image.height > max_pixels:
        raise InputError(
            f"{path}: {width:,} x {height:,} pixels; allowed are {max_pixels:,} in all "
            f"(a JPEG file may have more)"
        )


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "F":
        raise InputError(f"{path}: floating-point pixels have no defined range; use 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        upper = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(upper.astype(np.uint8))
    return image
