"""The size of the pictures that a tower takes."""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.models.images.document import LARGEST

__all__ = ["PictureSize"]


@dataclass(frozen=True, kw_only=True)
class PictureSize:
    """A size in pixels.

    Attributes:
        height: Pixels from top to bottom.
        width: Pixels from left to right.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        if not 1 <= min(self.height, self.width) <= max(self.height, self.width) <= LARGEST:
            raise ValueError(
                f"height and width are {self.height} and {self.width}; at least 1 is needed, and "
                f"at most {LARGEST:,} are allowed"
            )

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"
