"""CLIP's pictures, and those of its like (LLaVA, SigLIP, Gemma 3): padded, resized, cropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pocketvlm.json_io import DecodeError
from pocketvlm.models.images.document import (
    CLIP_MEAN,
    CLIP_STD,
    ImageDocument,
    Size,
    read_size,
    resize_target,
    square_side,
)

__all__ = [
    "ClipDocument",
    "ClipGeometry",
    "CropDocument",
    "Gemma3Document",
    "LlavaDocument",
    "SiglipDocument",
    "mean_color",
]


@dataclass(frozen=True, kw_only=True)
class ClipGeometry:
    """Resize, then cut the centre out, black where the picture is too small.

    Attributes:
        size: Height and width that are resized to, the length that the shorter edge is resized
            to, or `None`: pictures keep their size.
        crop: Side of the square that is cut out of the centre, or `None`.
        pad_color: Colour of what is added to make a picture square before that, or `None`.
        picture_size: Height and width of every picture that comes out.
        tiling: Pictures are not cut into tiles.
    """

    size: tuple[int, int] | int | None
    crop: int | None
    pad_color: tuple[int, int, int] | None
    picture_size: tuple[int, int]
    tiling: ClassVar[None] = None


@dataclass(frozen=True, kw_only=True)
class CropDocument(ImageDocument):
    """What processors of CLIP's kind are told: a size, and what is cut out of the centre."""

    size: Size = field(default_factory=lambda: {"shortest_edge": 224})
    default_to_square: bool = False
    crop_size: Size = field(default_factory=lambda: {"height": 224, "width": 224})
    do_resize: bool = True
    do_center_crop: bool = True
    image_mean: float | tuple[float, ...] = CLIP_MEAN
    image_std: float | tuple[float, ...] = CLIP_STD

    @property
    def needed(self) -> frozenset[str]:
        """Settings that pictures depend on, which must not be null."""
        names = {"size", "resample"} if self.do_resize else set()
        return super().needed | names | ({"crop_size"} if self.do_center_crop else set())


@dataclass(frozen=True, kw_only=True)
class ClipDocument(CropDocument):
    """What `CLIPImageProcessor` is told."""

    @property
    def pad_color(self) -> tuple[int, int, int] | None:
        """Colour of what makes a picture square; padding a batch does nothing to one picture."""
        return None

    def geometry(self) -> ClipGeometry:
        """What becomes of a picture."""
        size = read_size("size", self.size, is_square=self.default_to_square)
        crop = read_size("crop_size", self.crop_size, is_square=True)
        target = resize_target(size) if self.do_resize else None
        if not self.do_center_crop:
            side = square_side(target)
        elif set(crop) != {"height", "width"} or crop["height"] != crop["width"]:
            raise DecodeError("crop_size must be a square: the vision graph has one size")
        else:
            side = crop["height"]
        return ClipGeometry(
            size=target,
            crop=side if self.do_center_crop else None,
            pad_color=self.pad_color,
            picture_size=(side, side),
        )


def mean_color(means: tuple[float, ...]) -> tuple[int, int, int]:
    """The colour of borders, by the means of red, green and blue."""
    red, green, blue = (int(value * 255) for value in means)
    return red, green, blue


@dataclass(frozen=True, kw_only=True)
class LlavaDocument(ClipDocument):
    """What `LlavaImageProcessor` is told."""

    do_pad: bool = False

    @property
    def needed(self) -> frozenset[str]:
        """Settings that pictures depend on, which must not be null."""
        return super().needed | ({"image_mean"} if self.do_pad else set())

    @property
    def pad_color(self) -> tuple[int, int, int] | None:
        """The mean, where pictures are made square."""
        if not self.do_pad:
            return None
        if isinstance(self.image_mean, float):
            raise DecodeError(
                "image_mean must be a list where do_pad is true: it colours the border"
            )
        return mean_color(self.means)


@dataclass(frozen=True, kw_only=True)
class SiglipDocument(ClipDocument):
    """What `SiglipImageProcessor` is told."""

    size: Size = field(default_factory=lambda: {"height": 224, "width": 224})
    crop_size: Size = field(default_factory=dict)
    do_center_crop: bool = False
    image_mean: float | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: float | tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Gemma3Document(SiglipDocument):
    """What `Gemma3ImageProcessor` is told."""

    resample: int = 2
    do_pan_and_scan: bool = False

    def geometry(self) -> ClipGeometry:
        """What becomes of a picture."""
        if self.do_pan_and_scan:
            raise DecodeError("do_pan_and_scan must be false: pictures are shown once, as a whole")
        return super().geometry()
