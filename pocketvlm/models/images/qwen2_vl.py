"""Qwen2-VL's pictures."""

from __future__ import annotations

import math

__all__ = ["smart_size"]


def smart_size(width: int, height: int, *, factor: int, least: int, most: int) -> tuple[int, int]:
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
