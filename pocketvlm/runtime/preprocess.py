"""Pictures to pixels, bit for bit as Hugging Face's Pillow image processors make them.

What becomes of a picture is the geometry of its settings; all end in the same arithmetic,
`(float32(float64(pixel) * factor) - mean) / std`. A pixel has 256 values, so that is a table of 256
entries per channel, computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, InputError
from pocketvlm.image_file import to_rgb
from pocketvlm.models.images.cutting import cut_pictures
from pocketvlm.models.images.empty_tiles import EmptyTiles
from pocketvlm.models.images.llava_next import LlavaNextGeometry
from pocketvlm.models.images.reading import read_image_settings
from pocketvlm.models.images.settings import Geometry, ImageSettings
from pocketvlm.models.images.tilings import TileGrid, Tiling, grids_of
from pocketvlm.runtime.geometry import fit_tiles

__all__ = ["ImagePreprocessor"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePreprocessor:
    """What stands between a picture and the vision graph.

    Attributes:
        geometry: What becomes of the picture.
        empty_tiles: What leaves out tiles that show nothing; `None` where all are seen.
        resample: The filter that resizes it.
        table: float32 [3, 256]: what each value of each channel becomes.
    """

    geometry: Geometry
    resample: Image.Resampling
    table: npt.NDArray[np.float32]
    empty_tiles: EmptyTiles | None = None

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> ImagePreprocessor:
        """Reads the image processor's settings of a bundle, for its first vision graph.

        Raises:
            BundleError: They are missing, of an unknown kind, or do not fit the vision graph.
        """
        manifest, name = bundle.manifest, None
        settings = read_image_settings(bundle.path, manifest.family)
        if manifest.variants:
            first = manifest.variants[0]
            name, settings = first.name, settings.fitted(first.height, first.width)
        own = (1, 3, *settings.picture_size)
        for component in manifest.components:
            if component.role == "vision" and component.variant == name:
                shape = tuple(component.inputs[0].shape)
                if shape != own:
                    raise BundleError(
                        f"{settings.where}: makes pictures of {own}, but {component.file} takes "
                        f"{shape}"
                    )
        return cls.from_settings(settings)

    @classmethod
    def from_settings(cls, settings: ImageSettings) -> ImagePreprocessor:
        """The preprocessor of settings that were read before."""
        return cls(
            geometry=settings.geometry,
            empty_tiles=settings.empty_tiles,
            resample=Image.Resampling(settings.resample),
            table=_value_table(settings),
        )

    @property
    def tiling(self) -> Tiling | None:
        """How large pictures are cut; `None` where each is one tile."""
        return self.geometry.tiling

    def pixels(self, image: Image.Image, grid: TileGrid | None = None) -> npt.NDArray[np.float32]:
        """Pixels of one picture, float32 [tiles, 3, height, width].

        Equal to Hugging Face's Pillow processor bit for bit, save where that would need more than
        `MAX_PIXELS` in between (a picture some hundred times longer than wide): there the ends
        that the centre crop removes anyway are cut off first.

        Args:
            image: The picture.
            grid: Its entry of `grids` of all pictures of the conversation; `None` where it is the
                only one.

        Raises:
            InputError: The picture has no pixels, or cannot be decoded.
        """
        return self.cut(image, grid)[1]

    def cut(
        self, image: Image.Image, grid: TileGrid | None = None
    ) -> tuple[TileGrid, npt.NDArray[np.float32]]:
        """The tiles of one picture that are seen, and their pixels.

        Args:
            image: The picture.
            grid: How it is cut; what it leaves out is decided here.

        Raises:
            InputError: As `pixels`.
        """
        cut = self.grids_by_size([image.size])[0] if grid is None else grid
        seen, tiles = self._seen(image, cut)
        channels = np.moveaxis(tiles, -1, 0)
        pixels = [row[channel] for row, channel in zip(self.table, channels, strict=True)]
        return seen, np.stack(pixels, axis=1)

    def grids(self, images: Sequence[Image.Image]) -> list[TileGrid]:
        """The tiles of all pictures of a conversation.

        Raises:
            InputError: A picture has no pixels, or cannot be decoded.
        """
        sizes = [image.size for image in images]
        for size in sizes:
            _require_content(size)
        return cut_pictures(self, sizes, images.__getitem__)

    def grids_by_size(self, sizes: Sequence[tuple[int, int]]) -> list[TileGrid]:
        """All tiles of all pictures of a conversation, those that show nothing among them.

        Args:
            sizes: Widths and heights of upright pictures.

        Raises:
            InputError: A picture has no pixels.
        """
        for size in sizes:
            _require_content(size)
        return grids_of(self.tiling, sizes)

    def grid(self, image: Image.Image) -> TileGrid:
        """The tiles of the only picture of a conversation.

        Raises:
            InputError: As `grids`.
        """
        return self.grids([image])[0]

    def without_empty(self, image: Image.Image, grid: TileGrid) -> TileGrid:
        """The tiles of a picture that are seen, of those that its size has."""
        return self._seen(image, grid)[0]

    def _seen(self, image: Image.Image, grid: TileGrid) -> tuple[TileGrid, npt.NDArray[np.uint8]]:
        """The tiles of a picture that are seen, and their values, uint8 [tiles, H, W, 3]."""
        geometry = self.geometry
        if isinstance(geometry, LlavaNextGeometry) and not grid.rows:
            geometry = geometry.whole
        try:
            tiles = fit_tiles(to_rgb(image), geometry, self.resample)
        except OSError as error:  # a lazily opened file turns out to be truncated here
            raise InputError(f"the picture is damaged or truncated: {error}") from error
        if self.empty_tiles is None:
            return grid, tiles
        grid = self.empty_tiles.leave_out(grid, tiles)
        return grid, tiles[grid.seen]


def _require_content(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise InputError(f"a picture of {size[0]} x {size[1]} pixels has no content")


def _value_table(settings: ImageSettings) -> npt.NDArray[np.float32]:
    values = np.arange(256, dtype=np.float64)
    if settings.do_rescale:
        values *= settings.rescale_factor
    table = np.tile(values.astype(np.float32), (3, 1))
    if settings.do_normalize:
        means = np.array(settings.image_mean, np.float32).reshape(-1, 1)
        stds = np.array(settings.image_std, np.float32).reshape(-1, 1)
        table = (table - means) / stds
    return table
