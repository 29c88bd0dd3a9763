"""From a picture's tiles to the rows that stand for it in a prompt.

Most models show the decoder tile after tile. Where the tiles make up one map again (`RowOrder`),
rows of all of them are put in its order, with the bundle's learned row after each line; a prompt
then sees one picture and no tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle, PositionGrid, TileBudget
from pocketvlm.errors import BundleError
from pocketvlm.files.reader import read_bytes
from pocketvlm.models.images.tile_tokens import tile_tokens
from pocketvlm.models.images.tilings.tile_grid import TileGrid
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.splice import VisualFeatures

__all__ = ["PictureRows", "See", "TileFeatures"]

_FLOAT = np.dtype("<f4")

TileFeatures = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""What the vision graph returns for one tile: embeds [1, k, width] and indices [1, k]."""
See = Callable[[int, str | None], TileFeatures]
"""Shows a tile, by its place among those that are seen, to the vision graph of a name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureRows:
    """Encodes the pictures of one bundle.

    Attributes:
        per_tile: Placeholders of one tile, N.
        line_break: float32 [width]: the row after each line; `None` where there are no lines.
        grid: The N placeholders where positions have three axes; `None` where they have one.
        budget: Which vision graph sees which tile; `None` where one sees all.
        variants: Names of the graphs that it chooses among, by their numbers of tokens.
    """

    per_tile: int
    line_break: npt.NDArray[np.float32] | None
    grid: PositionGrid | None = None
    budget: TileBudget | None = None
    variants: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> PictureRows:
        """Reads the bundle's learned row, where it has one.

        Raises:
            BundleError: It is missing, or holds no finite numbers.
        """
        manifest, row = bundle.manifest, None
        if manifest.prompt.line_break is not None:
            path = bundle.file(manifest.prompt.line_break)
            content = read_bytes(path, error=BundleError)
            if not content or len(content) % _FLOAT.itemsize:
                raise BundleError(
                    f"{path}: holds {len(content)} bytes, which are not whole float32 numbers"
                )
            row = np.frombuffer(content, _FLOAT).astype(np.float32)
            if not np.isfinite(row).all():
                raise BundleError(f"{path}: holds a number that is not finite")
        return cls(
            per_tile=manifest.visual_tokens_full,
            grid=manifest.position_grid,
            line_break=row,
            budget=manifest.tile_budget,
            variants={variant.visual_tokens: variant.name for variant in manifest.variants},
        )

    def encode(
        self,
        runner: Runner,
        pixels: npt.NDArray[np.float32],
        grid: TileGrid,
        *,
        serial: int = 0,
        variant: str | None = None,
    ) -> list[VisualFeatures]:
        """The rows of one picture: one entry per tile, or one where tiles make up a map.

        Args:
            runner: The engine.
            pixels: float32 [tiles, C, S, S].
            grid: The tiles.
            serial: Number of the first entry; the others count on.
            variant: The vision graph, where the bundle has several; `None` for the first, or for
                those that the budget chooses.
        """

        def see(place: int, name: str | None) -> TileFeatures:
            return runner.encode_image(pixels[place : place + 1], name)

        return self.arrange(self.look(see, pixels, grid, variant=variant), grid, serial=serial)

    def look(
        self,
        see: See,
        pixels: npt.NDArray[np.float32],
        grid: TileGrid,
        *,
        variant: str | None = None,
    ) -> list[TileFeatures]:
        """What vision graphs return for the tiles of a picture: those that the budget chooses.

        Args:
            see: Runs a graph.
            pixels: float32 [tiles, C, S, S].
            grid: The tiles.
            variant: As `encode` takes it.
        """
        if self.budget is None:
            return [see(place, variant) for place in range(grid.tiles)]
        whole = grid.seen.index(grid.whole)
        seen = {whole: see(whole, self.variants[self.budget.whole])}
        kept = seen[whole][1][0]
        counts = tile_tokens(self.budget, grid, self.per_tile, pixels=pixels, kept=kept)
        # Graph by graph, since a runner may hold only some of them in memory.
        for place in sorted(range(grid.tiles), key=lambda place: counts[place]):
            if place != whole:
                seen[place] = see(place, self.variants[counts[place]])
        return [seen[place] for place in range(grid.tiles)]

    def arrange(
        self, tiles: Sequence[TileFeatures], grid: TileGrid, *, serial: int = 0
    ) -> list[VisualFeatures]:
        """The same from what the vision graph has returned for every tile.

        Raises:
            BundleError: The row after each line is missing or of another width.
        """
        order = grid.order(self.per_tile)
        if order is None:
            # Of a tile that is left out, no row stands for its placeholders.
            nothing = (tiles[0][0][:, :0], tiles[0][1][:, :0])
            seen = dict(zip(grid.seen, tiles, strict=True))
            every = [seen.get(number, nothing) for number in range(grid.all_tiles)]
            return [
                VisualFeatures(
                    embeds=embeds,
                    indices=indices,
                    placeholders=self.per_tile,
                    grid=self.grid,
                    serial=number,
                )
                for number, (embeds, indices) in enumerate(every, start=serial)
            ]
        width = tiles[0][0].shape[2]
        if self.line_break is None or len(self.line_break) != width:
            raise BundleError(
                f"pictures of this model need a row of {width} numbers after each line, and the "
                "bundle has none"
            )
        kept = order.kept([indices[0] for _, indices in tiles], self.per_tile)
        table = np.concatenate([*(embeds[0] for embeds, _ in tiles), self.line_break[None]])
        embeds = table[kept.rows]
        if kept.weights is not None:
            embeds = embeds * kept.weights[..., None]
        return [
            VisualFeatures(
                embeds=embeds.sum(axis=1)[None],
                indices=kept.offsets[None],
                placeholders=len(order.sources),
                serial=serial,
            )
        ]
