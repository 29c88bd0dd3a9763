"""Pictures to pixels, bit for bit as Hugging Face's Pillow image processors make them.

Five pipelines cover the families. The CLIP kind resizes and cuts out the middle, LLaVA's own after
padding the picture to a square; SigLIP's and Qwen2-VL's resize to one size alone. The Idefics3 kind
resizes twice, first so that the longest edge has a given length and then to a square, whatever the
aspect ratio; where it splits pictures, the second size is whole tiles, and the picture follows them
once more as a whole. The GotOcr2 kind resizes once, to the tiles whose ratio is nearest, the
LLaVA-NeXT kind to fit into a canvas of tiles. All end in the same arithmetic,
`(float32(float64(pixel) * factor) - mean) / std`. A pixel has 256 values, so that is a table of 256
entries per channel, computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, InputError
from pocketvlm.image_file import MAX_PIXELS, to_rgb
from pocketvlm.models.images.settings import (
    ImageSettings,
    parse_image_settings,
    read_image_settings,
)
from pocketvlm.models.images.tilings import (
    AspectGrid,
    LargeGrid,
    SplitGrid,
    TileGrid,
    Tiling,
    grids_of,
)
from pocketvlm.models.images.tilings.anyres import Anyres
from pocketvlm.models.images.tilings.split_grid import longest_edge_size

__all__ = [
    "CenterCrop",
    "Geometry",
    "ImagePreprocessor",
    "PaddedTiles",
    "Tiles",
    "TwoStepSquare",
]

_WIDEST_STRIP = 64


class Geometry(Protocol):
    """Brings an RGB picture of any size to tiles of the size that the vision graph takes."""

    def fit(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Returns [tiles, height, width, 3]."""


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """The CLIP kind: resize, then cut the centre out, black where the picture is too small.

    Attributes:
        size: Height and width that are resized to, the length that the shorter edge is resized
            to, or `None`: pictures keep their size.
        crop: Side of the square that is cut out of the centre, or `None`.
        pad_color: Colour of what is added to make a picture square before that, or `None`.
    """

    size: tuple[int, int] | int | None
    crop: int | None
    resample: Image.Resampling
    pad_color: tuple[int, int, int] | None = None

    def fit(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Pads, resizes and crops."""
        if self.pad_color is not None:
            image = _pad_to_square(image, self.pad_color)
        pixels = np.asarray(self._resize(image))
        return (pixels if self.crop is None else _center_crop(pixels, self.crop))[None]

    def _resize(self, image: Image.Image) -> Image.Image:
        if self.size is None:
            return image
        if isinstance(self.size, tuple):
            return image.resize((self.size[1], self.size[0]), self.resample)
        width, height = image.size
        longest = int(self.size * max(width, height) / min(width, height))
        if longest * self.size > MAX_PIXELS:
            image = _middle(image)
            width, height = image.size
            longest = int(self.size * max(width, height) / min(width, height))
        size = (self.size, longest) if width <= height else (longest, self.size)
        return image.resize(size, self.resample)


@dataclass(frozen=True, kw_only=True)
class TwoStepSquare:
    """The Idefics3 kind: first to its own size, then to a square.

    Attributes:
        side: Pixels along one side of the square.
        first: Height and width that are resized to first, the length of the longest edge, which
            keeps the ratio, or `None` for no first step.
    """

    side: int
    first: tuple[int, int] | int | None
    resample: Image.Resampling

    def fit(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resizes twice."""
        if isinstance(self.first, int):
            image = image.resize(longest_edge_size(*image.size, self.first), self.resample)
        elif self.first is not None:
            image = image.resize((self.first[1], self.first[0]), self.resample)
        return np.asarray(image.resize((self.side, self.side), self.resample))[None]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Pictures that are cut: tiles row by row, then the whole (Idefics3, InternVL, LFM2-VL).

    Attributes:
        tiling: Which tiles.
    """

    tiling: SplitGrid | AspectGrid | LargeGrid
    resample: Image.Resampling

    def fit(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resizes, cuts, and resizes once more as a whole."""
        side, tiled = self.tiling.side, image
        for size in self.tiling.resizes(*image.size):
            tiled = tiled.resize(size, self.resample)
        parts = _cut(tiled, side)
        if self.tiling.grid(*image.size).tiles > len(parts):
            whole = tiled if self.tiling.shrinks_tiled else image
            parts.append(whole.resize((side, side), self.resample))
        return np.stack([np.asarray(part) for part in parts])


@dataclass(frozen=True, kw_only=True)
class PaddedTiles:
    """The LLaVA-NeXT kind: the whole, then tiles of the picture in the middle of a black canvas.

    Attributes:
        tiling: Which tiles.
    """

    tiling: Anyres
    resample: Image.Resampling

    @property
    def side(self) -> int:
        """Pixels along one side of a tile."""
        return self.tiling.side

    def fit(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resizes the whole; resizes once more, centres, and cuts."""
        height, width = self.tiling.resolution(*image.size)
        own_width, own_height = self.tiling.fitted_size(*image.size)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(
            image.resize((own_width, own_height), self.resample),
            ((width - own_width) // 2, (height - own_height) // 2),
        )
        whole = image.resize((self.side, self.side), self.resample)
        return np.stack([np.asarray(part) for part in (whole, *_cut(canvas, self.side))])


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePreprocessor:
    """What stands between a picture and the vision graph.

    Attributes:
        geometry: How the picture is brought to size.
        tiling: How large pictures are cut; `None` where each is one tile.
        whole: How a picture is brought to size that is not cut because there are several.
        table: float32 [3, 256]: what each value of each channel becomes.
    """

    geometry: Geometry
    tiling: Tiling | None
    whole: Geometry
    table: npt.NDArray[np.float32]

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> ImagePreprocessor:
        """Reads the image processor's settings of a bundle.

        Raises:
            BundleError: They are missing, of an unknown kind, or do not fit the vision graph.
        """
        settings = read_image_settings(bundle.path, bundle.manifest.family)
        own = (1, 3, *settings.picture_size)
        for component in bundle.manifest.components:
            if component.role == "vision":
                shape = tuple(component.inputs[0].shape)
                if shape != own:
                    raise BundleError(
                        f"{settings.where}: makes pictures of {own}, but {component.file} takes "
                        f"{shape}"
                    )
        return cls.from_settings(settings)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], where: Path, *, family: str = "llava"
    ) -> ImagePreprocessor:
        """Reads the content of a preprocessor_config.json.

        Raises:
            BundleError: The kind of image processor, or a setting of it, is not supported.
        """
        return cls.from_settings(parse_image_settings(config, where, family))

    @classmethod
    def from_settings(cls, settings: ImageSettings) -> ImagePreprocessor:
        """The preprocessor of settings that were read before."""
        resample = Image.Resampling(settings.resample)
        size = _target(settings.size) if settings.do_resize else None
        if isinstance(settings.tiling, Anyres):
            geometry: Geometry = PaddedTiles(tiling=settings.tiling, resample=resample)
        elif settings.tiling is not None:
            geometry = Tiles(tiling=settings.tiling, resample=resample)
        elif settings.kind == "idefics3":
            geometry = TwoStepSquare(side=settings.side, first=size, resample=resample)
        else:
            geometry = CenterCrop(
                size=size,
                crop=settings.crop_size["height"] if settings.do_center_crop else None,
                resample=resample,
                pad_color=_color(settings.image_mean) if settings.do_pad else None,
            )
        whole = geometry
        if isinstance(settings.tiling, Anyres):
            whole = CenterCrop(
                size=(settings.side, settings.side),
                crop=None,
                resample=resample,
                pad_color=_color(settings.image_mean),
            )
        return cls(
            geometry=geometry,
            tiling=settings.tiling,
            whole=whole,
            table=_value_table(settings),
        )

    def pixels(self, image: Image.Image, grid: TileGrid | None = None) -> npt.NDArray[np.float32]:
        """Pixels of one picture, float32 [tiles, 3, height, width].

        Equal to Hugging Face's Pillow processor bit for bit, save where that would need more than
        `MAX_PIXELS` in between (a picture some hundred times longer than wide): there the ends
        that the centre crop removes anyway are cut off first.

        Args:
            image: The picture.
            grid: Its entry of `grids` of all pictures of the conversation; `None` where it is the
                only one.

        Raises:
            InputError: The picture has no pixels, or cannot be decoded.
        """
        geometry = self.geometry if grid in (None, self.grid(image)) else self.whole
        try:
            tiles = geometry.fit(to_rgb(image))
        except OSError as error:  # a lazily opened file turns out to be truncated here
            raise InputError(f"the picture is damaged or truncated: {error}") from error
        channels = np.moveaxis(tiles, -1, 0)
        pixels = [row[channel] for row, channel in zip(self.table, channels, strict=True)]
        return np.stack(pixels, axis=1)

    def grids(self, sizes: Sequence[tuple[int, int]]) -> list[TileGrid]:
        """The tiles of all pictures of a conversation, by their widths and heights.

        Raises:
            InputError: A picture has no pixels.
        """
        for size in sizes:
            _require_content(size)
        return grids_of(self.tiling, sizes)

    def grid(self, image: Image.Image) -> TileGrid:
        """The tiles of the only picture of a conversation.

        Raises:
            InputError: The picture has no pixels.
        """
        return self.grids([image.size])[0]


def _cut(image: Image.Image, side: int) -> list[Image.Image]:
    """The tiles of a picture, row by row."""
    return [
        image.crop((left, top, left + side, top + side))
        for top in range(0, image.height, side)
        for left in range(0, image.width, side)
    ]


def _require_content(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise InputError(f"a picture of {size[0]} x {size[1]} pixels has no content")


def _target(size: Mapping[str, int]) -> tuple[int, int] | int:
    if "height" in size:
        return size["height"], size["width"]
    return next(iter(size.values()))


def _color(mean: tuple[float, ...]) -> tuple[int, int, int]:
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def _value_table(settings: ImageSettings) -> npt.NDArray[np.float32]:
    values = np.arange(256, dtype=np.float64)
    if settings.do_rescale:
        values *= settings.rescale_factor
    table = np.tile(values.astype(np.float32), (3, 1))
    if settings.do_normalize:
        means = np.array(settings.image_mean, np.float32).reshape(-1, 1)
        stds = np.array(settings.image_std, np.float32).reshape(-1, 1)
        table = (table - means) / stds
    return table


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
