"""Image processor: transformers' own, as a folder configures it, on its Pillow backend.

The checkpoint side makes its pixels with it; `runtime.preprocess` makes the same pixels without the
library. What the two cannot do identically, and what the model would not accept, is refused when
the folder is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pocketvlm.errors import CheckpointError
from pocketvlm.json_io import read_json
from pocketvlm.models.images.got_ocr2 import GotOcr2Geometry
from pocketvlm.models.images.lfm2_vl import Lfm2VlGeometry
from pocketvlm.models.images.reading import read_image_settings
from pocketvlm.models.images.settings import ImageSettings
from pocketvlm.models.images.tilings import Anyres, AspectGrid, SplitGrid, TileGrid
from pocketvlm.models.spec import ModelSpec
from pocketvlm.processor.foreign_code import STOCK_ONLY
from pocketvlm.processor.patches import fit_picture, join_patches

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageProcessor", "as_tiles", "load_stock_pictures", "quiet_fallbacks"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageProcessor:
    """Turns pictures into pixels on the checkpoint side.

    Attributes:
        stock: The library's image processor.
        settings: Its settings, as the runtime reads them.
        spec: The model's specification.
        notes: Settings of the folder's processor that are not followed.
    """

    stock: Any
    settings: ImageSettings
    spec: ModelSpec
    notes: tuple[str, ...]

    @classmethod
    def load(cls, path: Path, spec: ModelSpec) -> ImageProcessor:
        """Loads the image processor of a checkpoint's folder, offline.

        Raises:
            CheckpointError: It is missing or broken, the runtime could not reproduce it, its
                pictures do not have the tower's size, or the folder's processor belongs to another
                family or writes another number of placeholders than the model needs.
        """
        settings = read_image_settings(path, spec.family, error=CheckpointError)
        tower = spec.tower
        settings.hold_size(
            tower.height, tower.width, "the tower of config.json", error=CheckpointError
        )
        geometry = settings.geometry
        if isinstance(geometry, Lfm2VlGeometry) and geometry.tile_tokens != spec.visual_tokens:
            raise CheckpointError(
                f"{settings.where}: encoder_patch_size and downsample_factor mean "
                f"{geometry.tile_tokens} placeholders for a tile, but the model makes "
                f"{spec.visual_tokens} visual tokens of it"
            )
        notes = [*settings.notes(), *_check_combined(path, spec)]
        try:
            stock = load_stock_pictures(path, settings)
        except Exception as error:  # the library may raise anything
            first_line = " ".join(str(error).split())
            raise CheckpointError(
                f"{settings.where}: the image processor cannot be read: {first_line}"
            ) from error
        cut = settings.tiling
        if isinstance(cut, Anyres):  # a rule stands in the processor's file alone
            cut = replace(cut, rule=None)
        if spec.tiling is not None and spec.tiling != cut:
            raise CheckpointError(
                f"{settings.where}: cuts pictures otherwise than config.json says: "
                f"{dict(spec.tiling.settings)} there"
            )
        if settings.takes_any_size:
            _hold_patches(stock, spec, settings.where)
        return cls(stock=stock, settings=settings, spec=spec, notes=tuple(notes))

    def with_settings(self, settings: ImageSettings, changes: Mapping[str, Any]) -> ImageProcessor:
        """The same with other settings, for pictures of the size that they say.

        Args:
            settings: All of them.
            changes: What differs, as the library's image processor is told.
        """
        stock = type(self.stock).from_dict({**self.stock.to_dict(), **changes})
        return replace(self, stock=stock, settings=settings, spec=self.spec.sized_by(settings))

    def pixels(self, images: Sequence[Image], grids: Sequence[TileGrid] | None = None) -> Tensor:
        """Pixels of all tiles, float32 [tiles, channels, height, width], picture by picture.

        Args:
            images: The pictures.
            grids: How each of them is cut; `None` where each is the only one of its conversation.
        """
        if self.settings.takes_any_size:
            return self._fitted_pixels(images)
        own = [self.settings.grid(*image.size) for image in images]
        if grids is not None:
            cuts = list(grids)
        elif self.settings.empty_tiles is None:
            cuts = own
        else:
            cuts = [self.without_empty(*one) for one in zip(images, own, strict=True)]
        if self.settings.tiling is None:
            pixels = self._stock_tiles(images)
        else:
            # A batch of pictures of several grids would be filled up with tiles that are empty.
            parts = [
                self._stock_tiles([image], is_alone=cut.complete == alone)
                for image, cut, alone in zip(images, cuts, own, strict=True)
            ]
            parts = [
                tiles[cut.seen] if cut.left_out else tiles
                for tiles, cut in zip(parts, cuts, strict=True)
            ]
            pixels = parts[0] if len(parts) == 1 else torch.cat(parts)
        tower = self.spec.tower
        tiles = sum(grid.tiles for grid in cuts)
        expected = (tiles, tower.channels, tower.height, tower.width)
        if tuple(pixels.shape) != expected:
            raise CheckpointError(
                f"{self.settings.where}: {len(images)} pictures become pixels of "
                f"{tuple(pixels.shape)}, but the tower takes {expected}"
            )
        return pixels.to(torch.float32)

    def without_empty(self, image: Image, grid: TileGrid) -> TileGrid:
        """The tiles of a picture that are seen, of those that its size has."""
        empty = self.settings.empty_tiles
        if empty is None:
            return grid
        is_alone = grid == self.settings.grid(*image.size)
        values = self._stock_tiles([image], is_alone=is_alone, do_rescale=False, do_normalize=False)
        return empty.leave_out(grid, values.movedim(1, -1).to(torch.uint8).numpy())

    def _stock_tiles(
        self, images: Sequence[Image], *, is_alone: bool = True, **settings: Any
    ) -> Tensor:
        """All tiles of pictures, as the library's class makes them.

        Args:
            images: The pictures.
            is_alone: Whether each is cut as the only one of its conversation.
            settings: Those of the call alone.
        """
        tiling = self.settings.tiling
        if isinstance(tiling, AspectGrid) and "min_patches" not in settings:  # likewise
            numbers = tiling.grid_numbers(*images[0].size)
            parts = [
                self._stock_tiles(images, **settings, min_patches=low, max_patches=high)
                for low, high in numbers
            ]
            # Each grid has the whole picture after its tiles.
            return torch.cat([*(tiles[:-1] for tiles in parts[:-1]), parts[-1]])
        # What a class does with a picture among others, it does with one twice.
        times = 1 if is_alone else 2
        if isinstance(tiling, SplitGrid | Anyres):  # one picture at a time
            settings |= tiling.picture_settings(*images[0].size)
        pictures = [[image] * times for image in images]
        found = self.stock(images=pictures, return_tensors="pt", do_convert_rgb=True, **settings)
        pixels = found["pixel_values"]
        return as_tiles(pixels[: len(pixels) // times], self.spec.tower.patch_size)

    def _fitted_pixels(self, images: Sequence[Image]) -> Tensor:
        """Pixels of pictures that are fitted to one size before the library's class sees them."""
        fitted = [fit_picture(image, self.settings) for image in images]
        vectors = self.stock(images=fitted, return_tensors="pt", do_resize=False)["pixel_values"]
        tower = self.spec.tower
        return join_patches(
            vectors.to(torch.float32),
            self.settings.picture_size,
            patch=tower.patch_size,
            merge=self.spec.projector.merge_factor,
        )


def load_stock_pictures(path: Path, settings: ImageSettings) -> Any:
    """The library's image processor of a folder, on its Pillow backend; it may raise anything."""
    from transformers import AutoImageProcessor

    geometry = settings.geometry
    if isinstance(geometry, Lfm2VlGeometry):
        from pocketvlm.processor.lfm2_pictures import Lfm2VlImageProcessorPil

        return Lfm2VlImageProcessorPil.from_pretrained(str(path), **STOCK_ONLY)
    imposed = geometry.imposed if isinstance(geometry, GotOcr2Geometry) else {}
    with quiet_fallbacks():
        return AutoImageProcessor.from_pretrained(str(path), backend="pil", **STOCK_ONLY, **imposed)


def as_tiles(pixels: Tensor, patch: int) -> Tensor:
    """What a stock image processor returns as pixel_values, as [tiles, channels, side, side].

    Args:
        pixels: [..., channels, side, side], or patches [tiles, patches, patch * patch * channels].
        patch: Pixels along one side of a patch.
    """
    if pixels.dim() > 3:  # noqa: PLR2004  (tiles)
        return pixels.flatten(0, -4)
    tiles, count, width = pixels.shape
    grid, channels = round(count**0.5), width // patch**2
    cells = pixels.view(tiles, grid, grid, patch, patch, channels)
    return torch.einsum("trcyxk->tkrycx", cells).reshape(tiles, channels, grid * patch, -1)


@contextmanager
def quiet_fallbacks() -> Iterator[None]:
    """Silences transformers' per-class warning that torchvision is missing, which is intended."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _hold_patches(stock: Any, spec: ModelSpec, where: Path) -> None:
    """Refuses an image processor that cuts pictures into other patches than the tower takes."""
    own = (stock.patch_size, stock.merge_size)
    wanted = (spec.tower.patch_size, spec.projector.merge_factor)
    if own != wanted:
        raise CheckpointError(
            f"{where}: patch_size and merge_size are {own[0]} and {own[1]}, but the tower of "
            f"config.json takes {wanted[0]} and {wanted[1]}"
        )


def _check_combined(path: Path, spec: ModelSpec) -> list[str]:
    """Checks what the folder's combined processor declares against the model."""
    documents = [
        (name, read_json(path / name, error=CheckpointError))
        for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
        if (path / name).is_file()
    ]
    allowed = spec.processor.classes
    where, found = next(
        (
            (name, document["processor_class"])
            for name, document in documents
            if document.get("processor_class") is not None
        ),
        ("", allowed[0]),
    )
    if found not in allowed:
        raise CheckpointError(
            f"{path / where}: processor_class {found!r} is not supported for {spec.model_type}; "
            f"allowed are {', '.join(allowed)}"
        )
    combined = dict(documents).get("processor_config.json", {})
    # Some image processors hold the count of the combined one.
    pictures = combined.get("image_processor") or dict(documents).get("preprocessor_config.json")
    setting = spec.processor.count_setting
    counted = combined
    if setting is not None:
        counted = {setting: (pictures or {}).get(setting), **combined}
    notes = _check_placeholders(path / "processor_config.json", counted, spec)
    if (
        combined.get("image_processor") is not None
        and (path / "preprocessor_config.json").is_file()
    ):
        notes.append(
            "preprocessor_config.json is not read: processor_config.json holds the image "
            "processor's settings itself, as stock transformers reads it"
        )
    return notes


def _check_placeholders(where: Path, combined: dict[str, Any], spec: ModelSpec) -> list[str]:
    """Checks that stock's processor writes as many placeholders per picture as the model fills."""
    expected = spec.visual_tokens
    setting = spec.processor.count_setting
    if setting is None:
        return []
    for name in ("patch_size", "num_additional_image_tokens", setting):
        if type(combined.get(name, 0)) not in (int, type(None)):
            raise CheckpointError(f"{where}: {name} must be a whole number")
    if spec.processor.counts_patches:
        patch = combined.get("patch_size")
        if patch is None:
            return [
                "processor_config.json states no patch_size, without which stock processors fail; "
                f"the {expected} placeholders of a picture are those of config.json"
            ]
        if patch < 1:
            raise CheckpointError(f"{where}: patch_size must be at least 1")
        strategy = combined.get("vision_feature_select_strategy")
        count = (spec.tower.height // patch) * (spec.tower.width // patch)
        count += combined.get("num_additional_image_tokens") or 0
        count -= 1 if strategy == "default" else 0
        stated = f"patch_size {patch} and vision_feature_select_strategy {strategy!r}"
    else:
        count, default = combined.get(setting), spec.processor.default_count
        if count is None:
            if expected == default:
                return []
            does = "fail" if default is None else f"write {default} placeholders"
            return [
                f"processor_config.json states no {setting}, for which stock processors {does}; "
                f"the model makes {expected} of a picture, which is what is written here"
            ]
        stated = f"{setting} {count}"
    if count != expected:
        raise CheckpointError(
            f"{where}: {stated} means {count} placeholders for a picture, but the model makes "
            f"{expected} visual tokens of it"
        )
    return []
