"""Geometry: RGB pictures of any size to tiles of the size that the vision graph takes.

CLIP's kind cuts out the middle, LLaVA-NeXT's fits the picture into a canvas of tiles. All others
resize it, once or twice, to one tile or to whole ones, which the picture follows once more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from pocketvlm.errors import InputError
from pocketvlm.image_file import MAX_PIXELS
from pocketvlm.models.images.clip import ClipGeometry
from pocketvlm.models.images.got_ocr2 import GotOcr2Geometry
from pocketvlm.models.images.idefics3 import Idefics3Geometry
from pocketvlm.models.images.lfm2_vl import Lfm2VlGeometry
from pocketvlm.models.images.llava_next import LlavaNextGeometry
from pocketvlm.models.images.qwen2_vl import Qwen2VlGeometry
from pocketvlm.models.images.settings import Geometry

__all__ = ["fit_tiles"]

_WIDEST_STRIP = 64

_Resized = Idefics3Geometry | GotOcr2Geometry | Qwen2VlGeometry | Lfm2VlGeometry


def fit_tiles(
    image: Image.Image, geometry: Geometry, resample: Image.Resampling
) -> npt.NDArray[np.uint8]:
    """The tiles of a picture, uint8 [tiles, height, width, 3].

    Raises:
        InputError: The picture would be too large in between.
    """
    if isinstance(geometry, ClipGeometry):
        return _cropped(image, geometry, resample)[None]
    if isinstance(geometry, LlavaNextGeometry):
        parts = _on_canvas(image, geometry, resample)
    else:
        parts = _resized(image, geometry, resample)
    return np.stack([np.asarray(part) for part in parts])


def _cropped(
    image: Image.Image, geometry: ClipGeometry, resample: Image.Resampling
) -> npt.NDArray[np.uint8]:
    """Pads, resizes and crops."""
    if geometry.pad_color is not None:
        image = _pad_to_square(image, geometry.pad_color)
    if isinstance(geometry.size, tuple):
        image = image.resize((geometry.size[1], geometry.size[0]), resample)
    elif geometry.size is not None:
        image = _resize_shortest(image, geometry.size, resample)
    pixels = np.asarray(image)
    return pixels if geometry.crop is None else _center_crop(pixels, geometry.crop)


def _resized(
    image: Image.Image, geometry: _Resized, resample: Image.Resampling
) -> list[Image.Image]:
    """Resizes and cuts, maybe by two grids; where tiles are several, the whole may follow them."""
    (height, width), tiling, tiled = geometry.picture_size, geometry.tiling, image
    for size in geometry.resizes(*image.size):
        tiled = tiled.resize(size, resample)
    parts = _cut(tiled, height, width)
    again = geometry.second_size(*image.size) if isinstance(geometry, GotOcr2Geometry) else None
    if again is not None:
        parts = [*_cut(image.resize(again, resample), height, width), *parts]
    if tiling is not None and tiling.grid(*image.size).tiles > len(parts):
        whole = tiled if tiling.shrinks_tiled else image
        parts.append(whole.resize((width, height), resample))
    return parts


def _on_canvas(
    image: Image.Image, geometry: LlavaNextGeometry, resample: Image.Resampling
) -> list[Image.Image]:
    """Resizes the whole; resizes once more, centres on black, and cuts."""
    tiling = geometry.tiling
    height, width = tiling.resolution(*image.size)
    own_width, own_height = tiling.fitted_size(*image.size)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(
        image.resize((own_width, own_height), resample),
        ((width - own_width) // 2, (height - own_height) // 2),
    )
    whole = image.resize((tiling.side, tiling.side), resample)
    return [whole, *_cut(canvas, tiling.side, tiling.side)]


def _cut(image: Image.Image, height: int, width: int) -> list[Image.Image]:
    """The tiles of a picture, row by row."""
    return [
        image.crop((left, top, left + width, top + height))
        for top in range(0, image.height, height)
        for left in range(0, image.width, width)
    ]


def _pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its longest edge."""
    width, height = image.size
    side = max(width, height)
    if side * side > MAX_PIXELS:
        raise InputError(
            f"a picture of {width} x {height} pixels is padded to a square by this model, which "
            f"would have more than {MAX_PIXELS:,} pixels"
        )
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _resize_shortest(image: Image.Image, edge: int, resample: Image.Resampling) -> Image.Image:
    """The picture with its shortest edge at a length."""
    width, height = image.size
    longest = int(edge * max(width, height) / min(width, height))
    if longest * edge > MAX_PIXELS:
        image = _middle(image)
        width, height = image.size
        longest = int(edge * max(width, height) / min(width, height))
    size = (edge, longest) if width <= height else (longest, edge)
    return image.resize(size, resample)


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a very long strip, which is all that a centre crop will look at."""
    width, height = image.size
    shortest = min(width, height)
    wide, high = min(width, _WIDEST_STRIP * shortest), min(height, _WIDEST_STRIP * shortest)
    left, top = (width - wide) // 2, (height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def _center_crop(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """The centre of [H, W, 3]; where the picture is smaller, black around it.

    The roundings differ between cutting and padding, as they do in Hugging Face.
    """
    height, width = pixels.shape[:2]
    top, left = (height - side) // 2, (width - side) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + side, left : left + side]
    canvas = np.zeros((max(side, height), max(side, width), 3), pixels.dtype)
    pad_top = -(-(canvas.shape[0] - height) // 2)
    pad_left = -(-(canvas.shape[1] - width) // 2)
    canvas[pad_top : pad_top + height, pad_left : pad_left + width] = pixels
    top, left = top + pad_top, left + pad_left
    return canvas[max(0, top) : min(canvas.shape[0], top + side)][
        :, max(0, left) : min(canvas.shape[1], left + side)
    ]
