"""LLaVA-NeXT's pictures, and LLaVA-OneVision's: the whole, then tiles of it on a black canvas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pocketvlm.json_io import DecodeError
from pocketvlm.models.images.clip import ClipGeometry, CropDocument, mean_color
from pocketvlm.models.images.document import (
    MOST_TILES,
    Size,
    hold_pixels,
    read_size,
    resize_target,
)
from pocketvlm.models.images.tilings import Anyres

__all__ = ["LlavaNextDocument", "LlavaNextGeometry"]


@dataclass(frozen=True, kw_only=True)
class LlavaNextGeometry:
    """The whole picture, then tiles of the picture in the middle of a canvas.

    Attributes:
        tiling: Which tiles.
        whole: What becomes of a picture that is not cut because there are several.
    """

    tiling: Anyres
    whole: ClipGeometry

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of every picture that comes out."""
        return self.tiling.side, self.tiling.side


@dataclass(frozen=True, kw_only=True)
class LlavaNextDocument(CropDocument):
    """What `LlavaNextImageProcessor` is told."""

    image_grid_pinpoints: tuple[tuple[int, int], ...] = (
        (336, 672),
        (672, 336),
        (672, 672),
        (1008, 336),
        (336, 1008),
    )
    most_area: ClassVar[int | None] = None
    cuts_several: ClassVar[bool] = True

    def geometry(self) -> LlavaNextGeometry:
        """What becomes of a picture."""
        size = read_size("size", self.size, is_square=self.default_to_square)
        crop = read_size("crop_size", self.crop_size, is_square=True)
        resize_target(size)  # refuses edges of other names
        if crop and set(crop) != {"height", "width"}:
            raise DecodeError("crop_size must name height and width")
        side = next(iter((crop or size).values()))  # of tiles, whether the whole is cropped or not
        edges = (*size.values(), *(crop.values() if self.do_center_crop else ()))
        if not self.do_resize or any(edge != side for edge in edges):
            raise DecodeError(f"do_resize must be true, and size and crop_size a square of {side}")
        resolutions = self.image_grid_pinpoints
        if not resolutions or any(edge < 1 or edge % side for pair in resolutions for edge in pair):
            raise DecodeError(
                f"image_grid_pinpoints must be heights and widths in multiples of {side}"
            )
        tiling = Anyres(
            side=side,
            resolutions=resolutions,
            most_area=self.most_area,
            cuts_several=self.cuts_several,
            rule=self.grid_rule,
        )
        hold_pixels(side, tiling.most_tiles - 1)
        if tiling.most_tiles > MOST_TILES:
            raise DecodeError(
                f"image_grid_pinpoints cut a picture into up to {tiling.most_tiles} tiles; allowed "
                f"are {MOST_TILES}"
            )
        square = (side, side)
        whole = ClipGeometry(
            size=square, crop=None, pad_color=mean_color(self.means), picture_size=square
        )
        return LlavaNextGeometry(tiling=tiling, whole=whole)


@dataclass(frozen=True, kw_only=True)
class LlavaOnevisionDocument(LlavaNextDocument):
    """What `LlavaOnevisionImageProcessor` is told."""

    size: Size = field(default_factory=lambda: {"height": 384, "width": 384})
    crop_size: Size = field(default_factory=dict)
    do_center_crop: bool = False
    image_grid_pinpoints: tuple[tuple[int, int], ...] = tuple(
        (384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)
    )
    most_area: ClassVar[int | None] = 9
    # "anyres_max_9", the only one that models are published with.
    cuts_several: ClassVar[bool] = False
