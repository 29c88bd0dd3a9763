"""Qwen2-VL's pictures: of any size and ratio in its own processor, fitted to one size here.

GLM-4.6V's and PaddleOCR-VL's are the same with other defaults, and where a picture is smaller than
one visual token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from pocketvlm.json_io import DecodeError
from pocketvlm.models.images.document import (
    CLIP_MEAN,
    CLIP_STD,
    LARGEST,
    ImageDocument,
    Size,
    hold_edges,
    key_names,
    parse_size,
)

__all__ = [
    "Glm46vDocument",
    "PaddleOcrVlDocument",
    "Qwen2VlDocument",
    "Qwen2VlGeometry",
    "smart_size",
]

_SIDE = 448
_WIDEST_PATCH = 128


@dataclass(frozen=True, kw_only=True)
class Qwen2VlGeometry:
    """Resized to one size that was chosen for the model, which takes any.

    Attributes:
        height: Pixels from top to bottom.
        width: Pixels from left to right.
        tiling: Pictures are not cut into tiles.
    """

    height: int
    width: int
    tiling: ClassVar[None] = None

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of every picture that comes out."""
        return self.height, self.width

    @property
    def note(self) -> str:
        """What a plan and a report say of that."""
        return (
            f"pictures are fitted to one size, {self.width} x {self.height} pixels unless "
            "set_resolution chooses another; the model's own processor keeps about their size and "
            "ratio"
        )

    def resizes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """Widths and heights that a picture is resized to, one after the other."""
        del width, height
        return ((self.width, self.height),)


@dataclass(frozen=True, kw_only=True)
class Qwen2VlDocument(ImageDocument):
    """What `Qwen2VLImageProcessor` is told, and the size that pictures are fitted to."""

    size: Size = field(
        default_factory=lambda: {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    )
    default_to_square: bool = False
    do_resize: bool = True
    min_pixels: int | None = None
    max_pixels: int | None = None
    patch_size: int = 14
    merge_size: int = 2
    fitted_size: Mapping[str, int] | None = None
    image_mean: float | tuple[float, ...] = CLIP_MEAN
    image_std: float | tuple[float, ...] = CLIP_STD

    @property
    def needed(self) -> frozenset[str]:
        """Settings that pictures depend on, which must not be null."""
        return super().needed | {"size", "resample"}

    @property
    def smallest_side(self) -> int:
        """What a picture's sides are made at least before anything else."""
        return 0

    @property
    def frames(self) -> int:
        """How often the pixels of a picture count against the bounds of its size."""
        return 1

    def geometry(self) -> Qwen2VlGeometry:
        """The size that is stated, or what becomes of a square of 448."""
        if not self.do_resize:
            raise DecodeError("do_resize must be true: pictures need one size")
        default = self._default_size()
        if self.fitted_size is None:
            height, width = default
        elif set(self.fitted_size) != {"height", "width"}:
            raise DecodeError("fitted_size must name height and width")
        else:
            height, width = self.fitted_size["height"], self.fitted_size["width"]
        hold_edges("fitted_size", height, width)
        return Qwen2VlGeometry(height=height, width=width)

    def _default_size(self) -> tuple[int, int]:
        patch, merge = self.patch_size, self.merge_size
        size = parse_size("size", self.size, is_square=self.default_to_square)
        least = size.get("shortest_edge") if self.min_pixels is None else self.min_pixels
        most = size.get("longest_edge") if self.max_pixels is None else self.max_pixels
        if least is None or most is None:
            raise DecodeError(
                f"size names {key_names(size)}; it must name shortest_edge and longest_edge"
            )
        for name, value in (("patch_size", patch), ("merge_size", merge)):
            if not 0 < value <= _WIDEST_PATCH:
                raise DecodeError(f"{name} must be 1 to {_WIDEST_PATCH}")
        if not 0 < least <= most <= LARGEST**2:
            raise DecodeError(
                "size must name a shortest_edge of at least 1 pixel, and no shorter "
                f"longest_edge of at most {LARGEST**2:,}"
            )
        side = max(_SIDE, self.smallest_side)
        return smart_size(
            side, side, factor=patch * merge, least=least / self.frames, most=most / self.frames
        )


@dataclass(frozen=True, kw_only=True)
class PaddleOcrVlDocument(Qwen2VlDocument):
    """What `PaddleOCRVLImageProcessor` is told."""

    size: Size = field(
        default_factory=lambda: {"shortest_edge": 384 * 384, "longest_edge": 1536 * 1536}
    )

    @property
    def smallest_side(self) -> int:
        """What a picture's sides are made at least before anything else."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, kw_only=True)
class Glm46vDocument(Qwen2VlDocument):
    """What `Glm46VImageProcessor` is told, which counts pixels frame by frame."""

    size: Size = field(
        default_factory=lambda: {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}
    )
    temporal_patch_size: int = 2

    @property
    def smallest_side(self) -> int:
        """What a picture's sides are made at least before anything else."""
        return self.patch_size * self.merge_size

    @property
    def frames(self) -> int:
        """How often the pixels of a picture count against the bounds of its size."""
        return self.temporal_patch_size


def smart_size(
    width: int, height: int, *, factor: int, least: float, most: float
) -> tuple[int, int]:
    """Width and height that Qwen2-VL (arXiv 2409.12191, section 2.1) resizes a picture to.

    Args:
        width: The picture's, in pixels.
        height: Likewise.
        factor: Pixels along a side of a visual token, of which both sides become multiples.
        least: Pixels that the picture has at least afterwards.
        most: Pixels that it has at most.
    """
    wide, high = round(width / factor) * factor, round(height / factor) * factor
    if wide * high > most:
        shrink = math.sqrt(width * height / most)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
        high = max(factor, math.floor(height / shrink / factor) * factor)
    elif wide * high < least:
        grow = math.sqrt(least / (width * height))
        wide = math.ceil(width * grow / factor) * factor
        high = math.ceil(height * grow / factor) * factor
    return wide, high
