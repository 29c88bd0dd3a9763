"""Patches: pictures as processors hand them to stock towers that take pictures of any size.

These keep a picture's ratio and cut it into vectors, one a patch, those of a visual token one after
another, and every frame of a still picture twice (Qwen-VL), or into small pictures, row by row
(PaddleOCR-VL). The towers of this package take pixels.
"""

from __future__ import annotations

from PIL.Image import Image, Resampling
from torch import Tensor

from pocketvlm.image_file import to_rgb
from pocketvlm.models.images.settings import ImageSettings

__all__ = ["fit_picture", "join_patches"]

_CHANNELS = 3


def fit_picture(image: Image, settings: ImageSettings) -> Image:
    """A picture in the size of the settings."""
    height, width = settings.picture_size
    return to_rgb(image).resize((width, height), Resampling(settings.resample))


def join_patches(vectors: Tensor, size: tuple[int, int], *, patch: int, merge: int) -> Tensor:
    """Pixels of pictures of one size, float32 [pictures, channels, height, width].

    Args:
        vectors: [pictures * patches, channels * frames * patch**2]; [pictures * patches, channels,
            patch, patch] where patches are in raster order.
        size: Height and width of each picture.
        patch: Pixels along a side of a patch.
        merge: Patches along a side of a visual token.
    """
    height, width = size
    if vectors.dim() > 2:  # noqa: PLR2004  (small pictures)
        vectors, merge = vectors.flatten(1), 1
    rows, columns = height // patch // merge, width // patch // merge
    frames = vectors.shape[-1] // (_CHANNELS * patch**2)
    grid = (rows, columns, merge, merge, _CHANNELS, frames, patch, patch)
    first = vectors.view(-1, *grid)[:, :, :, :, :, :, 0]
    return first.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, _CHANNELS, height, width)
