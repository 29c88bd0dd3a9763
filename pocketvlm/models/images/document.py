"""Documents: what a file states of an image processor, and what every kind reads alike.

A kind is a subclass. Its fields are the settings that it looks at; their defaults are the
attributes of the library's class, which stand for what a file leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketvlm.image_file import MAX_PIXELS
from pocketvlm.json_io import DecodeError
from pocketvlm.models.images.empty_tiles import MOST_CONTRAST, EmptyTiles
from pocketvlm.models.images.tilings.aspect_grid import SecondGrid
from pocketvlm.models.images.tilings.grid_rules import GridRule

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "LARGEST",
    "MOST_TILES",
    "ImageDocument",
    "Size",
    "hold_edges",
    "hold_pixels",
    "hold_tiles",
    "key_names",
    "parse_size",
    "read_size",
    "resize_target",
    "square_side",
]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST = 2**14
"""Pixels along an edge, and bound of other numbers."""
MOST_TILES = 65
"""Eight rows of eight, and the whole; models have markers for six by six."""
_CHANNELS = 3

Size = int | tuple[int, ...] | Mapping[str, int]
"""A size as a file may write it: a number, height and width, or edges by their names."""


@dataclass(frozen=True, kw_only=True)
class ImageDocument:
    """Settings that every kind has."""

    resample: int = 3
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: float | tuple[float, ...] = (0.5, 0.5, 0.5)
    do_convert_rgb: bool = True
    pad_size: Size | None = None
    data_format: str | None = None
    input_data_format: str | None = None
    empty_tile_contrast: int | None = None
    grid_rule: GridRule | None = None
    second_grid: SecondGrid | None = None

    @property
    def needed(self) -> frozenset[str]:
        """Settings that pictures depend on, which must not be null."""
        names = {"rescale_factor"} if self.do_rescale else set()
        return frozenset(names | ({"image_mean", "image_std"} if self.do_normalize else set()))

    @property
    def empty_tiles(self) -> EmptyTiles | None:
        """What leaves out tiles that show nothing; a setting of this package, unknown to others."""
        contrast = self.empty_tile_contrast
        if contrast is None:
            return None
        if not 1 <= contrast <= MOST_CONTRAST:
            raise DecodeError(
                f"empty_tile_contrast is {contrast}; allowed are 1 to {MOST_CONTRAST}"
            )
        return EmptyTiles(contrast=contrast)

    @property
    def means(self) -> tuple[float, ...]:
        """The mean of every channel."""
        return _per_channel("image_mean", self.image_mean)

    @property
    def deviations(self) -> tuple[float, ...]:
        """The standard deviation of every channel."""
        return _per_channel("image_std", self.image_std)


def parse_size(name: str, stated: Size, *, is_square: bool = False) -> Mapping[str, int]:
    """A size as a dictionary: a number alone is a square's side or the shortest edge."""
    if isinstance(stated, int):
        return {"height": stated, "width": stated} if is_square else {"shortest_edge": stated}
    if isinstance(stated, Mapping):
        return stated
    if len(stated) != 2:  # noqa: PLR2004  (height and width)
        raise DecodeError(f"{name} must have two numbers, height and width")
    return {"height": stated[0], "width": stated[1]}


def read_size(name: str, stated: Size, *, is_square: bool = False) -> Mapping[str, int]:
    """The same of pixels, none of them too many."""
    size = parse_size(name, stated, is_square=is_square)
    hold_edges(name, *size.values())
    return size


def resize_target(size: Mapping[str, int]) -> tuple[int, int] | int:
    """Height and width, or the length of the shortest edge."""
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    if set(size) != {"shortest_edge"}:
        raise DecodeError(f"size names {key_names(size)}; allowed: shortest_edge, height and width")
    return size["shortest_edge"]


def square_side(target: tuple[int, int] | int | None) -> int:
    """Side of the square that pictures are resized to where nothing is cut out of them."""
    if target is None:
        raise DecodeError("do_resize must be true without do_center_crop: pictures need one size")
    if isinstance(target, int):
        raise DecodeError("do_center_crop must be true where size is a shortest_edge")
    if target[0] != target[1]:
        raise DecodeError("size must be a square without do_center_crop")
    return target[0]


def hold_edges(name: str, *edges: int) -> None:
    """Refuses edges of no pixels or too many."""
    if any(not 0 < edge <= LARGEST for edge in edges):
        raise DecodeError(f"{name} must be between 1 and {LARGEST}")


def hold_tiles(name: str, fewest: int, most: int) -> None:
    """Refuses grids of no tiles or too many; their settings are `min_` and `max_` with the name."""
    if not 1 <= fewest <= most < MOST_TILES:
        raise DecodeError(
            f"min_{name} and max_{name} are {fewest} and {most}; allowed are 1 to "
            f"{MOST_TILES - 1}, the smaller first"
        )


def hold_pixels(side: int, tiles: int) -> None:
    """Refuses tiles that are a larger picture, side by side, than any file may hold."""
    if side**2 * tiles > MAX_PIXELS:
        raise DecodeError(f"{tiles} tiles of {side} x {side} are more than {MAX_PIXELS:,} pixels")


def key_names(size: Mapping[str, int]) -> str:
    """The keys of a size, for a message."""
    return " and ".join(size) or "nothing"


def _per_channel(name: str, stated: float | tuple[float, ...]) -> tuple[float, ...]:
    if isinstance(stated, int | float):
        return (float(stated),) * _CHANNELS
    if len(stated) != _CHANNELS:
        raise DecodeError(f"{name} must have {_CHANNELS} numbers")
    return stated
