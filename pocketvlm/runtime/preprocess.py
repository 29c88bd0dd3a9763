"""Pictures to pixels, bit for bit as Hugging Face's Pillow image processors make them.

Two pipelines cover the families. The CLIP kind resizes to the vision graph's side and crops the
centre; the Idefics3 kind resizes twice, first so that the longest edge has a given length and
then to a square, whatever the aspect ratio (tiling off: one picture is one tile). Both end in the
same arithmetic, `(float32(float64(pixel) * factor) - mean) / std`. A pixel has 256 values, so that
is a table of 256 entries a channel, computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, InputError
from pocketvlm.image_file import MAX_PIXELS
from pocketvlm.json_io import read_json

__all__ = ["CenterCrop", "Geometry", "ImagePreprocessor", "TwoStepSquare", "to_rgb"]

_CLIP_TYPES = ("CLIPImageProcessor", "SiglipImageProcessor")
_IDEFICS3_TYPES = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_LONGEST_EDGE_LIMIT = 4096
_WIDEST_STRIP = 64


class Geometry(Protocol):
    """Brings an RGB picture of any size to the side that the vision graph takes."""

    @property
    def side(self) -> int:
        """Pixels along one side of the result."""

    def fit(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Returns [side, side, 3]."""


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """The CLIP kind: resize, then cut the centre out, black where the picture is too small.

    Attributes:
        shortest_edge: Length that the shorter edge is resized to, or `None`: both edges to `side`.
    """

    side: int
    shortest_edge: int | None
    resample: Image.Resampling

    def fit(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resizes and crops."""
        if self.shortest_edge is None:
            return np.asarray(image.resize((self.side, self.side), self.resample))
        width, height = image.size
        longest = int(self.shortest_edge * max(width, height) / min(width, height))
        if longest * self.shortest_edge > MAX_PIXELS:
            image = _middle(image)
            width, height = image.size
            longest = int(self.shortest_edge * max(width, height) / min(width, height))
        size = (self.shortest_edge, longest) if width <= height else (longest, self.shortest_edge)
        return _center_crop(np.asarray(image.resize(size, self.resample)), self.side)


@dataclass(frozen=True, kw_only=True)
class TwoStepSquare:
    """The Idefics3 kind: the longest edge to a length, keeping the ratio, then to a square."""

    side: int
    longest_edge: int
    resample: Image.Resampling

    def fit(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resizes twice."""
        width, height = _longest_edge_size(*image.size, self.longest_edge)
        image = image.resize((width, height), self.resample)
        return np.asarray(image.resize((self.side, self.side), self.resample))


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePreprocessor:
    """What stands between a picture and the vision graph.

    Attributes:
        geometry: How the picture is brought to size.
        table: float32 [3, 256]: what each value of each channel becomes.
    """

    geometry: Geometry
    table: npt.NDArray[np.float32]

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> ImagePreprocessor:
        """Reads the image processor's settings of a bundle.

        Raises:
            BundleError: They are missing, of an unknown kind, or do not fit the vision graph.
        """
        config, where = _read_config(bundle.path)
        preprocessor = cls.from_config(config, where)
        for component in bundle.manifest.components:
            if component.role == "vision":
                shape = tuple(component.inputs[0].shape)
                side = preprocessor.geometry.side
                if shape != (1, 3, side, side):
                    raise BundleError(
                        f"{where}: makes pictures of (1, 3, {side}, {side}), but "
                        f"{component.file} takes {shape}"
                    )
        return preprocessor

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: Path) -> ImagePreprocessor:
        """Reads the content of a preprocessor_config.json.

        Raises:
            BundleError: The kind of image processor, or a setting of it, is not supported.
        """
        kind = str(config.get("image_processor_type")).removesuffix("Fast")
        if kind not in _CLIP_TYPES + _IDEFICS3_TYPES:
            raise BundleError(
                f"{where}: image_processor_type {kind!r} is not supported; supported are "
                f"{', '.join(_CLIP_TYPES + _IDEFICS3_TYPES)}"
            )
        if not config.get("do_resize", True):
            raise BundleError(f"{where}: do_resize must be true: the vision graph has one size")
        try:
            if kind in _IDEFICS3_TYPES:
                geometry: Geometry = _read_two_step(config)
            else:
                geometry = _read_crop(config, is_siglip=kind == _CLIP_TYPES[1])
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{where}: sizes cannot be read: {error!r}") from error
        mean, std = (_CLIP_MEAN, _CLIP_STD) if kind == _CLIP_TYPES[0] else (_HALF, _HALF)
        return cls(geometry=geometry, table=_value_table(config, mean, std))

    def pixels(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Pixels of one picture, float32 [1, 3, side, side].

        Equal to Hugging Face's Pillow processor bit for bit, save where that would need more than
        `MAX_PIXELS` in between (a picture some hundred times longer than wide): there the ends
        that the centre crop removes anyway are cut off first.

        Raises:
            InputError: The picture has no pixels, or cannot be decoded.
        """
        if min(image.size) < 1:
            raise InputError(f"a picture of {image.width} x {image.height} pixels has no content")
        try:
            square = self.geometry.fit(to_rgb(image))
        except OSError as error:  # a lazily opened file turns out to be truncated here
            raise InputError(f"the picture is damaged or truncated: {error}") from error
        channels = np.moveaxis(square, -1, 0)
        return np.stack([row[channel] for row, channel in zip(self.table, channels, strict=True)])[
            None
        ]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB; what is transparent shows white, as in Hugging Face."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _read_config(path: Path) -> tuple[Mapping[str, Any], Path]:
    """The image processor's settings: nested in processor_config.json, or in their own file."""
    nested = path / "processor_config.json"
    if nested.is_file():
        config = read_json(nested).get("image_processor")
        if isinstance(config, dict):
            return config, nested
    own = path / "preprocessor_config.json"
    if own.is_file():
        return read_json(own), own
    raise BundleError(f"{path}: preprocessor_config.json (or processor_config.json) is missing")


def _read_crop(config: Mapping[str, Any], *, is_siglip: bool) -> CenterCrop:
    size = config["size"]
    resample = Image.Resampling(config.get("resample", Image.Resampling.BICUBIC))
    if isinstance(size, int):
        size = {"height": size, "width": size} if is_siglip else {"shortest_edge": size}
    if set(size) == {"shortest_edge"}:
        crop = config.get("crop_size", {"height": size["shortest_edge"]})
        if not config.get("do_center_crop", True):
            raise ValueError("do_center_crop must be true where size is a shortest_edge")
        side = crop if isinstance(crop, int) else crop["height"]
        if not isinstance(crop, int) and crop.get("width", side) != side:
            raise ValueError(f"crop_size {crop} is not square")
        return CenterCrop(side=side, shortest_edge=size["shortest_edge"], resample=resample)
    if set(size) == {"height", "width"} and size["height"] == size["width"]:
        side = size["height"]
        crop = config.get("crop_size") if config.get("do_center_crop") else None
        if crop not in (None, side, {"height": side, "width": side}):
            raise ValueError(f"crop_size {crop} differs from size {size}")
        return CenterCrop(side=side, shortest_edge=None, resample=resample)
    raise ValueError(f"size {size} is neither a shortest_edge nor a square")


def _read_two_step(config: Mapping[str, Any]) -> TwoStepSquare:
    return TwoStepSquare(
        side=config["max_image_size"]["longest_edge"],
        longest_edge=config["size"]["longest_edge"],
        resample=Image.Resampling(config.get("resample", Image.Resampling.LANCZOS)),
    )


def _value_table(
    config: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    values = np.arange(256)
    if config.get("do_rescale", True):
        values = values.astype(np.float64) * config.get("rescale_factor", 1 / 255)
    table = np.tile(values.astype(np.float32), (3, 1))
    if config.get("do_normalize", True):
        means = np.array(config.get("image_mean") or mean, np.float32).reshape(-1, 1)
        stds = np.array(config.get("image_std") or std, np.float32).reshape(-1, 1)
        table = (table - means) / stds
    return table


def _longest_edge_size(width: int, height: int, length: int) -> tuple[int, int]:
    """Size with the longest edge at `length`; the shorter edge is even, and at least 1."""
    ratio = width / height
    if width >= height:
        width, height = length, int(length / ratio)
        height += height % 2
    else:
        width, height = int(length * ratio), length
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    limit = _LONGEST_EDGE_LIMIT
    ratio = width / height
    if width >= height and width > limit:
        width, height = limit, int(limit / ratio)
    elif height > width and height > limit:
        width, height = int(limit * ratio), limit
    return max(width, 1), max(height, 1)


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
