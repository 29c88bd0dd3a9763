"""Idefics3's pictures, and SmolVLM's: resized twice, to a square or to whole tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pocketvlm.json_io import DecodeError
from pocketvlm.models.images.document import (
    MOST_TILES,
    ImageDocument,
    Size,
    hold_edges,
    key_names,
    read_size,
)
from pocketvlm.models.images.tilings import SplitGrid
from pocketvlm.models.images.tilings.grid_rules import GridRule

__all__ = ["Idefics3Document", "Idefics3Geometry"]


@dataclass(frozen=True, kw_only=True)
class Idefics3Geometry:
    """First to its own size, then to a square, or to tiles that the whole picture follows.

    Attributes:
        side: Pixels along one side of the square, or of a tile.
        first: Height and width that are resized to first, the length of the longest edge, which
            keeps the ratio, or `None` for no first step.
        is_split: Whether pictures are cut into tiles.
        rule: What chooses their grid; `None` for the model's own way.
    """

    side: int
    first: tuple[int, int] | int | None
    is_split: bool
    rule: GridRule | None = None

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of every picture that comes out."""
        return self.side, self.side

    @property
    def tiling(self) -> SplitGrid | None:
        """How pictures are cut into tiles; `None` where each is one."""
        if self.first is None or not self.is_split:
            return None
        return SplitGrid(side=self.side, first=self.first, rule=self.rule)

    def resizes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """Widths and heights that a picture is resized to, one after the other, to be cut."""
        square = (self.side, self.side)
        if self.first is None:
            return (square,)
        tiling = SplitGrid(side=self.side, first=self.first, rule=self.rule)
        if self.is_split:
            return tiling.resizes(width, height)
        return tiling.first_size(width, height), square


@dataclass(frozen=True, kw_only=True)
class Idefics3Document(ImageDocument):
    """What `Idefics3ImageProcessor` and `SmolVLMImageProcessor` are told."""

    resample: int = 1
    size: Size = field(default_factory=lambda: {"longest_edge": 4 * 364})
    default_to_square: bool = True
    max_image_size: Mapping[str, int] = field(default_factory=lambda: {"longest_edge": 364})
    do_resize: bool = True
    do_image_splitting: bool = True

    @property
    def needed(self) -> frozenset[str]:
        """Settings that pictures depend on, which must not be null."""
        names = {"resample", "max_image_size"} | ({"size"} if self.do_resize else set())
        return super().needed | names

    def geometry(self) -> Idefics3Geometry:
        """What becomes of a picture."""
        size = read_size("size", self.size, is_square=self.default_to_square)
        hold_edges("max_image_size", *self.max_image_size.values())
        if set(self.max_image_size) != {"longest_edge"}:
            raise DecodeError("max_image_size must name longest_edge")
        if self.do_image_splitting and not self.do_resize:
            raise DecodeError("do_resize must be true where do_image_splitting is")
        first = _first(size) if self.do_resize else None
        geometry = Idefics3Geometry(
            side=self.max_image_size["longest_edge"],
            first=first,
            is_split=self.do_image_splitting,
            rule=self.grid_rule,
        )
        if self.grid_rule is not None and not (geometry.is_split and isinstance(first, int)):
            raise DecodeError(
                "grid_rule needs do_image_splitting, and size to name longest_edge, which says how "
                "many tiles there may be"
            )
        tiling = geometry.tiling
        if tiling is not None and tiling.most_tiles > MOST_TILES:
            raise DecodeError(
                f"size and max_image_size cut a picture into up to {tiling.most_tiles} tiles; "
                f"allowed are {MOST_TILES}"
            )
        return geometry


def _first(size: Mapping[str, int]) -> tuple[int, int] | int:
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    if set(size) != {"longest_edge"}:
        raise DecodeError(
            f"size names {key_names(size)}; allowed are longest_edge, height and width"
        )
    return size["longest_edge"]
