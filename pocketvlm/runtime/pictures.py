"""Pictures of a conversation, from what an app gives to what a vision graph has seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from PIL.Image import Image

from pocketvlm.image_file import open_image, read_image
from pocketvlm.models.images.tilings import TileGrid
from pocketvlm.runtime.splice import VisualFeatures
from pocketvlm.runtime.vision import VisionGraph

__all__ = [
    "EncodedPicture",
    "KnownPicture",
    "OpenedPicture",
    "PictureInput",
    "Shown",
    "UnseenPicture",
    "open_picture",
]

PictureInput = Image | Path | str | bytes
"""A picture, the path of its file, or what a file holds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedPicture:
    """A picture that a vision graph has seen.

    Attributes:
        source: What was given.
        size: Its width and height, upright.
        graph: The vision graph that saw it.
        cut: How it is cut, by its size.
        grid: The tiles of these that are seen.
        rows: What stands for it in prompts.
    """

    source: PictureInput
    size: tuple[int, int]
    graph: VisionGraph
    cut: TileGrid
    grid: TileGrid
    rows: list[VisualFeatures]


Shown = PictureInput | EncodedPicture
"""What a turn may show: a picture, or one that was encoded ahead."""


def open_picture(shown: Shown) -> Image:
    """The picture, decoded.

    Raises:
        InputError: It cannot be read.
    """
    if isinstance(shown, EncodedPicture):
        return open_picture(shown.source)
    if isinstance(shown, Image):
        return shown
    if isinstance(shown, bytes):
        return read_image(shown, "the picture")
    return open_image(Path(shown))


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedPicture:
    """A picture that no vision graph has seen yet."""

    source: PictureInput
    image: Image

    @classmethod
    def of(cls, source: PictureInput) -> OpenedPicture:
        """The picture, decoded; errors are those of `open_picture`."""
        return cls(source=source, image=open_picture(source))

    @property
    def size(self) -> tuple[int, int]:
        """Its width and height, upright."""
        return self.image.size

    def cut(self, graph: VisionGraph, cut: TileGrid) -> UnseenPicture:
        """The same with the graph that will see it, and how it is cut."""
        return UnseenPicture(source=self.source, image=self.image, graph=graph, cut=cut)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnseenPicture:
    """A picture that a vision graph is going to see.

    Attributes:
        source: What was given.
        image: The picture.
        graph: The vision graph.
        cut: How it is cut, by its size.
    """

    source: PictureInput
    image: Image
    graph: VisionGraph
    cut: TileGrid

    def without_empty(self) -> UnseenPicture:
        """The same without tiles that show nothing, where the bundle leaves those out."""
        preprocessor = self.graph.preprocessor
        if preprocessor.empty_tiles is None:
            return self
        return replace(self, cut=preprocessor.without_empty(self.image, self.cut))


KnownPicture = EncodedPicture | UnseenPicture
"""A picture of which is known how it is cut."""
