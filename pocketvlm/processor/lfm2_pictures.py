"""The image processor of LFM2-VL on the library's Pillow backend, which has none for it.

Its arithmetic is that backend's and its geometry that of the library's class, which needs
torchvision, with one exception: a picture that is not cut, and the whole picture after tiles, have
the size of a tile, where that class chooses one by the picture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.processing_utils import ImagesKwargs

__all__ = ["Lfm2VlImageProcessorPil"]

_BILINEAR = 2


class _Settings(ImagesKwargs, total=False):  # type: ignore[call-arg]  # transformers is not typed
    """Settings beyond those of every image processor, as the library's class names them."""

    downsample_factor: int
    do_image_splitting: bool
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    min_image_tokens: int
    max_image_tokens: int
    encoder_patch_size: int
    tile_size: int
    max_pixels_tolerance: float
    return_row_col_info: bool


class Lfm2VlImageProcessorPil(PilBackend):
    """Pictures to patches [tiles, patches, patch * patch * channels], and what they are of.

    Attributes are the settings of the library's class, with its defaults.
    """

    valid_kwargs = _Settings
    model_input_names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    downsample_factor = 2
    do_image_splitting = True
    min_tiles = 2
    max_tiles = 10
    use_thumbnail = True
    min_image_tokens = 64
    max_image_tokens = 256
    encoder_patch_size = 16
    tile_size = 512
    max_pixels_tolerance = 2.0
    do_resize = True
    size: Any = {"height": 512, "width": 512}  # noqa: RUF012  (replaced by each object's own)
    resample = _BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    return_row_col_info = False

    def _preprocess(self, images: list[np.ndarray], **settings: Any) -> BatchFeature:
        side, patch = settings["tile_size"], settings["encoder_patch_size"]
        tiles, places = [], []
        for image in images:
            rows, columns = self._grid(image, settings)
            places.append((rows, columns))
            parts = self._cut(image, rows, columns, settings)
            if len(parts) > 1 and settings["use_thumbnail"]:
                parts += self._cut(image, 1, 1, settings)
            tiles += [self._patches(part, settings) for part in parts]
        grid = side // patch
        data: dict[str, Any] = {
            "pixel_values": np.stack(tiles),
            "pixel_attention_mask": np.ones((len(tiles), grid * grid), np.int32),
            "spatial_shapes": np.full((len(tiles), 2), grid, np.int64),
        }
        if settings["return_row_col_info"]:
            data["image_rows"], data["image_cols"] = (
                list(each) for each in zip(*places, strict=True)
            )
            data["image_sizes"] = [[side, side]] * len(images)
        return BatchFeature(data, tensor_type=settings["return_tensors"])

    def _grid(self, image: np.ndarray, settings: dict[str, Any]) -> tuple[int, int]:
        """Rows and columns of the tiles of a picture [channels, height, width]."""
        _, height, width = image.shape
        patch, side = settings["encoder_patch_size"], settings["tile_size"]
        unit = patch * settings["downsample_factor"]
        most = settings["max_image_tokens"] * unit**2 * settings["max_pixels_tolerance"]
        high, wide = (max(patch, round(edge / unit) * unit) for edge in (height, width))
        if not settings["do_image_splitting"] or high * wide <= most:
            return 1, 1
        columns, rows = get_optimal_tiled_canvas(
            (height, width), (side, side), settings["min_tiles"], settings["max_tiles"]
        )
        return rows, columns

    def _cut(
        self, image: np.ndarray, rows: int, columns: int, settings: dict[str, Any]
    ) -> list[np.ndarray]:
        """The tiles of a picture [channels, height, width], row by row."""
        side = settings["tile_size"]
        size = SizeDict(height=rows * side, width=columns * side)
        resized = self.resize(image, size, resample=settings["resample"])
        return [
            resized[:, top : top + side, left : left + side]
            for top in range(0, rows * side, side)
            for left in range(0, columns * side, side)
        ]

    def _patches(self, tile: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
        """A tile's pixels as numbers, patch by patch, channels last within a patch."""
        if settings["do_rescale"]:
            tile = self.rescale(tile, settings["rescale_factor"])
        if settings["do_normalize"]:
            tile = self.normalize(tile, settings["image_mean"], settings["image_std"])
        channels, side, _ = tile.shape
        patch = settings["encoder_patch_size"]
        grid = side // patch
        cells = tile.reshape(channels, grid, patch, grid, patch).transpose(1, 3, 2, 4, 0)
        return cells.reshape(grid * grid, patch * patch * channels)
