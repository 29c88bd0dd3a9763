"""Image settings: what a folder's image processor is told, as stock transformers resolves it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pocketvlm.errors import BundleError, PocketVLMError
from pocketvlm.models.images.clip import ClipGeometry
from pocketvlm.models.images.empty_tiles import EmptyTiles
from pocketvlm.models.images.got_ocr2 import GotOcr2Geometry
from pocketvlm.models.images.idefics3 import Idefics3Geometry
from pocketvlm.models.images.lfm2_vl import Lfm2VlGeometry
from pocketvlm.models.images.llava_next import LlavaNextGeometry
from pocketvlm.models.images.qwen2_vl import Qwen2VlGeometry
from pocketvlm.models.images.tilings import (
    ONE_TILE,
    Anyres,
    AspectGrid,
    SplitGrid,
    TileGrid,
    Tiling,
)

__all__ = ["Geometry", "ImageSettings"]

Geometry = (
    ClipGeometry
    | Idefics3Geometry
    | GotOcr2Geometry
    | LlavaNextGeometry
    | Qwen2VlGeometry
    | Lfm2VlGeometry
)
"""What a kind of image processor does to a picture."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Settings of an image processor, every one resolved.

    Attributes:
        where: The file that they stand in.
        geometry: What becomes of a picture, by the kind of the image processor.
        empty_tiles: What leaves out tiles that show nothing; `None` where all are seen.
        resample: Number of Pillow's filter.
        image_mean: One per channel.
        image_std: Likewise.
    """

    where: Path
    geometry: Geometry
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    do_convert_rgb: bool
    empty_tiles: EmptyTiles | None = None

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of every picture that comes out."""
        return self.geometry.picture_size

    def fitted(self, height: int, width: int) -> ImageSettings:
        """The same for pictures of another size, where the model takes any."""
        if not isinstance(self.geometry, Qwen2VlGeometry):
            return self
        return replace(self, geometry=Qwen2VlGeometry(height=height, width=width))

    @property
    def takes_any_size(self) -> bool:
        """Whether the model takes pictures of any size, so that this one was chosen for it."""
        return isinstance(self.geometry, Qwen2VlGeometry)

    @property
    def tiling(self) -> Tiling | None:
        """How pictures are cut into tiles; `None` where each is one."""
        return self.geometry.tiling

    def grid(self, width: int, height: int) -> TileGrid:
        """The tiles of an upright picture of this size."""
        return ONE_TILE if self.tiling is None else self.tiling.grid(width, height)

    def hold_size(
        self, height: int, width: int, taker: str, *, error: type[PocketVLMError] = BundleError
    ) -> None:
        """Refuses settings that make pictures of another size than is taken.

        Args:
            height: Pixels from top to bottom that are taken.
            width: Pixels from left to right.
            taker: What takes them, for the message.
            error: What is raised.

        Raises:
            PocketVLMError: `error`.
        """
        if self.picture_size != (height, width):
            own = self.picture_size
            raise error(
                f"{self.where}: makes pictures of {own[1]} x {own[0]}, but {taker} takes "
                f"{width} x {height}"
            )

    def notes(self) -> list[str]:
        """Settings that are not followed, for a plan and a report."""
        notes = []
        if isinstance(self.geometry, Qwen2VlGeometry | Lfm2VlGeometry):
            notes.append(self.geometry.note)
        if self.empty_tiles is not None:
            notes.append(
                f"tiles with a contrast below {self.empty_tiles.contrast} are left out, which the "
                "model's own processor does not do"
            )
        if isinstance(self.tiling, SplitGrid | Anyres) and self.tiling.rule is not None:
            notes.append(
                f"pictures are cut as {self.tiling.rule.kind} says, and not in the model's own way"
            )
        if isinstance(self.tiling, AspectGrid) and self.tiling.second is not None:
            notes.append(
                "pictures are cut by a second grid as well, which the model's own processor does "
                "not do"
            )
        if not self.do_convert_rgb:
            notes.append(
                f"{self.where.name}: do_convert_rgb is false and not followed: pictures that are "
                "not RGB are converted, where the model's own processor fails"
            )
        return notes
