"""GotOcr2's pictures, which are InternVL's: cut into the grid whose ratio is nearest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from pocketvlm.json_io import DecodeError
from pocketvlm.models.images.document import (
    CLIP_MEAN,
    CLIP_STD,
    ImageDocument,
    Size,
    hold_pixels,
    hold_tiles,
    read_size,
    resize_target,
    square_side,
)
from pocketvlm.models.images.tilings import AspectGrid

__all__ = ["GotOcr2Document", "GotOcr2Geometry"]


@dataclass(frozen=True, kw_only=True)
class GotOcr2Geometry:
    """Resized once and cut, by another grid as well where there is one, and once more as a whole.

    Attributes:
        tiling: Which tiles.
        imposed: What the model's combined processor tells the image processor, whatever its file
            says.
    """

    imposed: ClassVar[Mapping[str, bool]] = {"crop_to_patches": True}

    tiling: AspectGrid

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of every picture that comes out."""
        return self.tiling.side, self.tiling.side

    def resizes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """Widths and heights that a picture is resized to, one after the other, to be cut."""
        return self.tiling.resizes(width, height)

    def second_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Width and height that it is resized to, to be cut by another grid; or `None`."""
        return self.tiling.second_size(width, height)


@dataclass(frozen=True, kw_only=True)
class GotOcr2Document(ImageDocument):
    """What `GotOcr2ImageProcessor` is told."""

    size: Size = field(default_factory=lambda: {"height": 384, "width": 384})
    default_to_square: bool = True
    do_resize: bool = True
    do_center_crop: bool = False
    min_patches: int = 1
    max_patches: int = 12
    image_mean: float | tuple[float, ...] = CLIP_MEAN
    image_std: float | tuple[float, ...] = CLIP_STD

    @property
    def needed(self) -> frozenset[str]:
        """Settings that pictures depend on, which must not be null."""
        return super().needed | ({"size", "resample"} if self.do_resize else set())

    def geometry(self) -> GotOcr2Geometry:
        """What becomes of a picture."""
        if self.do_center_crop:
            raise DecodeError("do_center_crop must be false: pictures are cut into tiles")
        size = read_size("size", self.size, is_square=self.default_to_square)
        side = square_side(resize_target(size) if self.do_resize else None)
        hold_tiles("patches", self.min_patches, self.max_patches)
        tiling = AspectGrid(
            side=side, fewest=self.min_patches, most=self.max_patches, second=self.second_grid
        )
        hold_pixels(side, tiling.most_tiles - 1)
        return GotOcr2Geometry(tiling=tiling)
