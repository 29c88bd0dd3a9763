"""What stands in a prompt where a picture is: its placeholders, and the text that frames them."""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.models.images.tilings import ONE_TILE, TileGrid

__all__ = ["PictureText"]

_WIDEST = TileGrid(rows=8, columns=8)


@dataclass(frozen=True, kw_only=True)
class PictureText:
    """The text of a picture, as the model's own processor writes it.

    Attributes:
        placeholder: The token that stands once for every visual token.
        count: Placeholders of one tile, N.
        prefix: Text before those of a whole picture.
        suffix: Text after them.
        tile_marker: Text before those of a tile, `{row}` and `{column}` counted from 1; `None`
            where all placeholders of a picture are one run. Tiles stand row by row, the whole
            picture after them.
        whole_marker: Text before those of the whole picture where prefix and suffix enclose its
            tiles as well; `None` where they are its own, and line breaks, one after each row of
            tiles and one more, stand before it.
        mark: What the chat template writes for a picture; `None` for the placeholder itself.
    """

    placeholder: str
    count: int
    prefix: str = ""
    suffix: str = ""
    tile_marker: str | None = None
    whole_marker: str | None = None
    mark: str | None = None

    def write(self, grid: TileGrid = ONE_TILE) -> str:
        """The text of a picture that is cut in this way; one run where tiles have no markers."""
        if self.tile_marker is None or not grid.is_split:
            return f"{self.prefix}{self.placeholder * grid.placeholders(self.count)}{self.suffix}"
        visual = self.placeholder * self.count
        whole = f"{self.prefix}{visual}{self.suffix}"
        # Replaced, not formatted: a marker may come from anybody's manifest.
        lines = []
        for row in range(1, grid.rows + 1):
            marker = self.tile_marker.replace("{row}", str(row))
            columns = range(1, grid.columns + 1)
            tiles = [marker.replace("{column}", str(column)) + visual for column in columns]
            lines.append("".join(tiles))
        if self.whole_marker is None:
            return "\n".join([*lines, "", whole])
        if grid.has_whole:
            lines += [self.whole_marker, visual]
        return "".join([self.prefix, *lines, self.suffix])

    def writes(self, word: str) -> bool:
        """Whether a token can be part of a picture's text."""
        return word in self.write(ONE_TILE if self.tile_marker is None else _WIDEST)
