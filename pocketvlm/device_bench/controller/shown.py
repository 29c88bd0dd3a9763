"""What a bundle makes of a workload's pictures: which vision graph sees each, in which tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocketvlm.bundle import Bundle
from pocketvlm.image_file import read_image
from pocketvlm.models.images.tilings import TileGrid
from pocketvlm.runtime.vision import VisionChoice, choose_vision, open_vision

__all__ = ["ShownPicture", "show_pictures"]


@dataclass(frozen=True, kw_only=True)
class ShownPicture:
    """One picture, as a bundle sees it.

    Attributes:
        vision: Which of the bundle's vision graphs sees it, by its place in the manifest; the first
            where a tile budget chooses, since their work differs after the tower alone.
        grid: The tiles of it that are seen.
        placeholders: Placeholders of a tile in the prompt.
        kept: Visual tokens of a tile, on average at most where tiles differ.
        kept_of_whole: Those of the whole picture beside its tiles; `None` for as many.
        pixels: Pixels of the encoded picture.
    """

    vision: int
    grid: TileGrid
    placeholders: int
    kept: int
    kept_of_whole: int | None
    pixels: int

    @property
    def most_rows(self) -> int:
        """Rows of the decoder that it takes, at most."""
        return self.grid.most_rows(self.placeholders, self.kept, self.kept_of_whole)


def show_pictures(
    bundle: Bundle, pictures: Sequence[bytes], wanted: VisionChoice
) -> tuple[ShownPicture, ...]:
    """The pictures of a conversation, as the runtime will see them.

    Args:
        bundle: The bundle.
        pictures: Encoded pictures.
        wanted: Which vision graph is asked for.

    Raises:
        BundleError: A file is missing, or does not fit the graphs.
        InputError: A picture cannot be read, or there is no such graph.
    """
    graphs = open_vision(bundle)
    images = [read_image(content, "the workload's picture") for content in pictures]
    cuts = graphs[0].preprocessor.grids_by_size([image.size for image in images])
    # What a tile budget chooses among stands before the graphs of the manifest.
    chosen = 0 if bundle.manifest.tile_budget is None else 1
    shown = []
    for image, cut in zip(images, cuts, strict=True):
        graph = choose_vision(graphs, image.size, wanted)
        kept, of_whole = (
            bundle.manifest.tile_tokens
            if graph.visual_tokens is None
            else (graph.visual_tokens, None)
        )
        has_empty = graph.preprocessor.empty_tiles is not None
        shown.append(
            ShownPicture(
                vision=max(0, graphs.index(graph) - chosen),
                grid=graph.preprocessor.without_empty(image, cut) if has_empty else cut,
                placeholders=graph.rows.per_tile,
                kept=kept,
                kept_of_whole=of_whole,
                pixels=image.width * image.height,
            )
        )
    return tuple(shown)
