"""LFM2-VL's pictures: resized to a square, and large ones to tiles that the whole may follow."""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.json_io import DecodeError
from pocketvlm.models.images.document import (
    LARGEST,
    ImageDocument,
    hold_edges,
    hold_pixels,
    hold_tiles,
)
from pocketvlm.models.images.tilings import LargeGrid

__all__ = ["Lfm2VlDocument", "Lfm2VlGeometry"]


@dataclass(frozen=True, kw_only=True)
class Lfm2VlGeometry:
    """Resized once, cut where the picture is large, and once more as a whole.

    Attributes:
        side: Pixels along one side of a tile.
        unit: Pixels along one side of a visual token.
        tiling: Which tiles; `None` where each picture is one.
    """

    side: int
    unit: int
    tiling: LargeGrid | None

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of every picture that comes out."""
        return self.side, self.side

    @property
    def tile_tokens(self) -> int:
        """Placeholders of a tile."""
        return (self.side // self.unit) ** 2

    @property
    def note(self) -> str:
        """What a plan and a report say of pictures that are fitted to a tile."""
        cut = "" if self.tiling is None else " that are not cut, and wholes after tiles,"
        return (
            f"pictures{cut} are fitted to {self.side} x {self.side} pixels, where the model's own "
            "processor keeps about their size and ratio"
        )

    def resizes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """Widths and heights that a picture is resized to, one after the other, to be cut."""
        if self.tiling is None:
            return ((self.side, self.side),)
        return self.tiling.resizes(width, height)


@dataclass(frozen=True, kw_only=True)
class Lfm2VlDocument(ImageDocument):
    """What `Lfm2VlImageProcessor` is told; it has a size as well, and does not look at it."""

    resample: int = 2
    tile_size: int = 512
    do_image_splitting: bool = True
    do_center_crop: bool = False
    min_tiles: int = 2
    max_tiles: int = 10
    use_thumbnail: bool = True
    encoder_patch_size: int = 16
    downsample_factor: int = 2
    max_image_tokens: int = 256
    max_pixels_tolerance: float = 2.0

    @property
    def needed(self) -> frozenset[str]:
        """Settings that pictures depend on, which must not be null."""
        return super().needed | {"resample"}

    def geometry(self) -> Lfm2VlGeometry:
        """What becomes of a picture."""
        side, unit = self.tile_size, self.encoder_patch_size * self.downsample_factor
        hold_edges("tile_size", side)
        if unit < 1 or side % unit:
            raise DecodeError(
                "tile_size must be a multiple of encoder_patch_size x downsample_factor, and is "
                f"{side}"
            )
        if not 1 <= self.max_image_tokens <= LARGEST or not self.max_pixels_tolerance > 0:
            raise DecodeError("max_image_tokens and max_pixels_tolerance must be above 0")
        hold_tiles("tiles", self.min_tiles, self.max_tiles)
        if self.do_center_crop:
            raise DecodeError("do_center_crop must be false: pictures are cut into tiles")
        tiling = LargeGrid(
            side=side,
            fewest=self.min_tiles,
            most=self.max_tiles,
            patch=self.encoder_patch_size,
            unit=unit,
            most_pixels=self.max_image_tokens * unit**2 * self.max_pixels_tolerance,
            has_whole=self.use_thumbnail,
        )
        if not self.do_image_splitting:
            return Lfm2VlGeometry(side=side, unit=unit, tiling=None)
        hold_pixels(side, tiling.most_tiles - 1)
        return Lfm2VlGeometry(side=side, unit=unit, tiling=tiling)
