"""The vision graphs of a bundle, and which of them a picture is shown to.

Where a bundle has graphs for several sizes of pictures, a picture is fitted to the one whose ratio
of sides is closest to its own, unless the app names a size. Of graphs that keep several numbers of
visual tokens, the first is taken, or for each tile that which a budget chooses, unless the app
names a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from pocketvlm.bundle import Bundle
from pocketvlm.errors import InputError
from pocketvlm.models.images.tilings import TileGrid
from pocketvlm.runtime.picture_rows import PictureRows
from pocketvlm.runtime.preprocess import ImagePreprocessor

__all__ = [
    "ANY_VISION",
    "VisionChoice",
    "VisionGraph",
    "choose_vision",
    "only_vision",
    "open_vision",
]


@dataclass(frozen=True, kw_only=True)
class VisionChoice:
    """What an app asks of the graph that sees a picture.

    Attributes:
        visual_tokens: Visual tokens of every tile; `None` for what the bundle's tile budget says,
            or its first number.
        resolution: Width and height of what the graph takes, in pixels; `None` for those that are
            closest to the picture's ratio of sides.
    """

    visual_tokens: int | None = None
    resolution: tuple[int, int] | None = None

    def __str__(self) -> str:
        tokens, size = self.visual_tokens, self.resolution
        parts = [] if tokens is None else [f"{tokens} visual tokens"]
        return " of ".join([*parts, *([] if size is None else [f"{size[0]} x {size[1]} pixels"])])


ANY_VISION = VisionChoice()
"""Nothing is asked."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionGraph:
    """One vision graph, or those that a tile budget chooses among, with what is before and after.

    Attributes:
        name: Its name for a runner; `None` where it is the only one, or a budget chooses.
        visual_tokens: Embeddings that it returns for one tile; `None` where a budget chooses.
        preprocessor: Pictures to its pixels.
        rows: Its tiles to rows.
    """

    name: str | None
    visual_tokens: int | None
    preprocessor: ImagePreprocessor
    rows: PictureRows

    @property
    def resolution(self) -> tuple[int, int]:
        """Width and height of a tile."""
        height, width = self.preprocessor.geometry.picture_size
        return width, height

    def has(self, wanted: VisionChoice) -> bool:
        """Whether it is what an app asks for."""
        return wanted.visual_tokens in (None, self.visual_tokens) and wanted.resolution in (
            None,
            self.resolution,
        )

    def least_rows(self, grid: TileGrid) -> int:
        """Rows of the decoder that a picture takes, whatever it shows.

        It takes no others but where tiles of one picture may differ in their tokens, or where
        reduced tiles make up one map: there it may take more.
        """
        kept, whole, budget = self.visual_tokens, None, self.rows.budget
        if budget is not None:
            kept, whole = budget.levels[0], budget.whole
        per_tile = self.rows.per_tile
        return grid.least_rows(per_tile, per_tile if kept is None else kept, whole)

    def distortion(self, size: tuple[int, int]) -> Fraction:
        """How much more a picture is stretched along one side than along the other, at least 1."""
        width, height = self.resolution
        ratio = Fraction(width * size[1], height * size[0])
        return max(ratio, 1 / ratio)


def open_vision(bundle: Bundle) -> tuple[VisionGraph, ...]:
    """The vision graphs of a bundle, in the order of its manifest, a tile budget's choice first.

    Raises:
        BundleError: A file is missing, or does not fit them.
    """
    graphs = tuple(
        VisionGraph(
            name=own.manifest.variants[0].name if own.manifest.variants else None,
            visual_tokens=own.manifest.visual_tokens,
            preprocessor=ImagePreprocessor.from_bundle(own),
            rows=PictureRows.from_bundle(own),
        )
        for own in bundle.each_vision()
    )
    if bundle.manifest.tile_budget is None:
        return graphs
    rows = PictureRows.from_bundle(bundle)
    return (replace(graphs[0], name=None, visual_tokens=None, rows=rows), *graphs)


def only_vision(bundle: Bundle, wanted: VisionChoice) -> Bundle:
    """The bundle with the first vision graph alone that is what is asked for.

    Where no number of tokens is, and the bundle has a tile budget, it keeps all that this chooses.

    Raises:
        InputError: There is no such graph.
        BundleError: A file is missing, or does not fit the graphs.
    """
    graphs = open_vision(bundle)
    _require(graphs, wanted)
    visions = bundle.each_vision()
    if bundle.manifest.tile_budget is not None:
        visions = (bundle, *visions)
    return next(own for graph, own in zip(graphs, visions, strict=True) if graph.has(wanted))


def choose_vision(
    graphs: Sequence[VisionGraph], size: tuple[int, int], wanted: VisionChoice
) -> VisionGraph:
    """The graph that sees a picture.

    Args:
        graphs: Those of the bundle.
        size: The picture's width and height, upright.
        wanted: What the app asks for.

    Raises:
        InputError: There is no such graph.
    """
    _require(graphs, wanted)
    return min(
        (graph for graph in graphs if graph.has(wanted)), key=lambda graph: graph.distortion(size)
    )


def _require(graphs: Sequence[VisionGraph], wanted: VisionChoice) -> None:
    if not any(graph.has(wanted) for graph in graphs):
        there = [
            VisionChoice(visual_tokens=graph.visual_tokens, resolution=graph.resolution)
            for graph in graphs
            if graph.visual_tokens is not None
        ]
        raise InputError(
            f"no vision graph for {wanted}; this bundle has {', '.join(map(str, there))}"
        )
