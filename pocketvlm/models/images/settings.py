"""Image settings: what a folder's image processor is told, as stock transformers resolves it.

Which file counts, what a missing value stands for and how a size may be written are the library's
rules (its Pillow backend). The checkpoint side asks them what it is about to lose, the runtime
turns pictures into pixels by them. Whatever the runtime could not follow exactly is refused here,
by the name of the setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pocketvlm.errors import BundleError, PocketVLMError
from pocketvlm.image_file import MAX_PIXELS
from pocketvlm.json_io import DecodeError, decode, read_json
from pocketvlm.models.images.qwen2_vl import smart_size
from pocketvlm.models.images.tilings import (
    ONE_TILE,
    AspectGrid,
    LargeGrid,
    SplitGrid,
    TileGrid,
    Tiling,
)
from pocketvlm.models.images.tilings.anyres import Anyres

__all__ = ["ImageKind", "ImageSettings", "parse_image_settings", "read_image_settings"]

ImageKind = Literal[
    "clip",
    "llava",
    "siglip",
    "idefics3",
    "got_ocr2",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "lfm2_vl",
    "gemma3",
]

_KINDS: dict[str, ImageKind] = {
    "CLIPImageProcessor": "clip",
    "LlavaImageProcessor": "llava",
    "SiglipImageProcessor": "siglip",
    "Idefics3ImageProcessor": "idefics3",
    "SmolVLMImageProcessor": "idefics3",
    "GotOcr2ImageProcessor": "got_ocr2",
    "Lfm2VlImageProcessor": "lfm2_vl",
    "LlavaNextImageProcessor": "llava_next",
    "LlavaOnevisionImageProcessor": "llava_onevision",
    "Qwen2VLImageProcessor": "qwen2_vl",
    "Gemma3ImageProcessor": "gemma3",
}
_FAMILY_KINDS: dict[str, tuple[ImageKind, ...]] = {
    "llava": ("llava", "clip", "siglip"),
    "idefics3": ("idefics3",),
    "internvl": ("got_ocr2",),
    "lfm2_vl": ("lfm2_vl",),
    "llava_next": ("llava_next", "llava_onevision"),
    "qwen_vl": ("qwen2_vl",),
    "paligemma": ("siglip",),
    "gemma3": ("gemma3",),
}
"""Kinds that a family's processor works with; the first is the one without any type."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_RESAMPLING = range(6)
_CHANNELS = 3
_LARGEST = 2**14
_SMALLEST = 1e-6
_SIDE = 448
_WIDEST_PATCH = 128
_MOST_TILES = 65
"""Eight rows of eight, and the whole; models have markers for six by six."""

Size = int | tuple[int, ...] | Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Settings of an image processor, every one resolved.

    Attributes:
        kind: Which pipeline it is.
        where: The file that they stand in.
        size: What pictures are resized to: `height` and `width`, `shortest_edge` or
            `longest_edge`; the first of two steps for the Idefics3 kind; `height` and `width` of
            the one size that pictures of the Qwen2-VL kind are fitted to.
        crop_size: `height` and `width` that are cut out of the middle.
        max_image_size: `longest_edge`, the side of the Idefics3 kind's tiles.
        do_image_splitting: Whether a large picture is cut into several of them.
        min_patches: Tiles of the smallest grid that the GotOcr2 kind considers.
        max_patches: Tiles of its largest grid.
        image_grid_pinpoints: Heights and widths that the LLaVA-NeXT kind fits pictures into.
        min_tiles: As `min_patches`, of the LFM2-VL kind.
        max_tiles: As `max_patches`.
        use_thumbnail: Whether the whole picture follows its tiles there.
        encoder_patch_size: Pixels along one side of its patches.
        downsample_factor: Patches along one side of its visual tokens.
        max_image_tokens: Visual tokens of its largest picture that is not cut, but for
        max_pixels_tolerance: how many times more pixels that one may have.
        resample: Number of Pillow's filter.
        image_mean: One per channel.
        image_std: Likewise.
    """

    kind: ImageKind
    where: Path
    size: Mapping[str, int]
    crop_size: Mapping[str, int]
    max_image_size: Mapping[str, int]
    resample: int
    do_resize: bool
    do_center_crop: bool
    do_pad: bool
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    do_convert_rgb: bool
    do_image_splitting: bool
    min_patches: int
    max_patches: int
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    encoder_patch_size: int
    downsample_factor: int
    max_image_tokens: int
    max_pixels_tolerance: float

    @property
    def is_anyres(self) -> bool:
        """Whether it fits pictures into resolutions."""
        return self.kind in ("llava_next", "llava_onevision")

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of every picture that comes out."""
        if self.kind == "idefics3":
            return (self.max_image_size["longest_edge"],) * 2
        is_cut = self.do_center_crop or (self.is_anyres and self.crop_size)
        size = self.crop_size if is_cut else self.size
        if "height" not in size:
            return (size["shortest_edge"],) * 2
        return size["height"], size["width"]

    @property
    def side(self) -> int:
        """Pixels along one side of a tile, which is a square."""
        return self.picture_size[0]

    @property
    def takes_any_size(self) -> bool:
        """Whether the model takes pictures of any size, so that this one was chosen for it."""
        return self.kind == "qwen2_vl"

    @property
    def tiling(self) -> Tiling | None:
        """How pictures are cut into tiles; `None` where each is one."""
        if self.is_anyres:
            is_onevision = self.kind == "llava_onevision"
            return Anyres(
                side=self.side,
                resolutions=tuple((height, width) for height, width in self.image_grid_pinpoints),
                most_area=_MOST_AREA if is_onevision else None,
                cuts_several=not is_onevision,
            )
        if not self.do_image_splitting:
            return None
        if self.kind == "lfm2_vl":
            unit = self.encoder_patch_size * self.downsample_factor
            return LargeGrid(
                side=self.side,
                fewest=self.min_tiles,
                most=self.max_tiles,
                patch=self.encoder_patch_size,
                unit=unit,
                most_pixels=self.max_image_tokens * unit**2 * self.max_pixels_tolerance,
                has_whole=self.use_thumbnail,
            )
        if self.kind == "got_ocr2":
            return AspectGrid(side=self.side, fewest=self.min_patches, most=self.max_patches)
        size = self.size
        first = (size["height"], size["width"]) if "height" in size else size["longest_edge"]
        return SplitGrid(side=self.side, first=first)

    def with_tiling(self, tiling: Tiling) -> ImageSettings:
        """The same with the settings that cut pictures in this way."""
        return replace(self, **tiling.settings)

    @property
    def imposed(self) -> Mapping[str, bool]:
        """What the model's combined processor tells the image processor, whatever its file says."""
        return {"crop_to_patches": True} if self.kind == "got_ocr2" else {}

    @property
    def tile_tokens(self) -> int | None:
        """Placeholders of a tile, where the image processor's settings count them."""
        if self.kind != "lfm2_vl":
            return None
        return (self.side // (self.encoder_patch_size * self.downsample_factor)) ** 2

    @property
    def most_tiles(self) -> int:
        """Tiles of the picture that costs most."""
        return 1 if self.tiling is None else self.tiling.most_tiles

    def grid(self, width: int, height: int) -> TileGrid:
        """The tiles of an upright picture of this size."""
        return ONE_TILE if self.tiling is None else self.tiling.grid(width, height)

    def with_picture_size(self, height: int, width: int) -> ImageSettings:
        """The same for pictures of another size, where the model takes any.

        Raises:
            ValueError: It takes one size alone.
        """
        if not self.takes_any_size:
            raise ValueError(f"{self.where}: the size of pictures is the model's own")
        return replace(self, size={"height": height, "width": width})

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
        if self.takes_any_size:
            height, width = self.picture_size
            notes.append(
                f"pictures are fitted to one size, {width} x {height} pixels unless set_resolution "
                "chooses another; the model's own processor keeps about their size and ratio"
            )
        if self.kind == "lfm2_vl":
            cut = " that are not cut, and wholes after tiles," if self.tiling is not None else ""
            notes.append(
                f"pictures{cut} are fitted to {self.side} x {self.side} pixels, where the model's "
                "own processor keeps about their size and ratio"
            )
        if not self.do_convert_rgb:
            notes.append(
                f"{self.where.name}: do_convert_rgb is false and not followed: pictures that are "
                "not RGB are converted, where the model's own processor fails"
            )
        return notes


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings as a file states them; `None` for what it leaves out."""

    size: Size | None = None
    default_to_square: bool | None = None
    crop_size: Size | None = None
    pad_size: Size | None = None
    max_image_size: Mapping[str, int] | None = None
    resample: int | None = None
    do_resize: bool | None = None
    do_center_crop: bool | None = None
    do_pad: bool | None = None
    do_rescale: bool | None = None
    rescale_factor: float | None = None
    do_normalize: bool | None = None
    image_mean: float | tuple[float, ...] | None = None
    image_std: float | tuple[float, ...] | None = None
    do_convert_rgb: bool | None = None
    do_image_splitting: bool | None = None
    min_patches: int | None = None
    max_patches: int | None = None
    image_grid_pinpoints: tuple[tuple[int, int], ...] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    patch_size: int | None = None
    merge_size: int | None = None
    fitted_size: Mapping[str, int] | None = None
    tile_size: int | None = None
    min_tiles: int | None = None
    max_tiles: int | None = None
    use_thumbnail: bool | None = None
    encoder_patch_size: int | None = None
    downsample_factor: int | None = None
    min_image_tokens: int | None = None
    max_image_tokens: int | None = None
    max_pixels_tolerance: float | None = None
    do_pan_and_scan: bool | None = None
    data_format: str | None = None
    input_data_format: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Defaults:
    """Attributes of the library's class of a kind."""

    size: Mapping[str, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = 3
    do_center_crop: bool = False
    do_image_splitting: bool = False
    crop_size: Mapping[str, int] = field(default_factory=dict)
    default_to_square: bool = False
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()


_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
_EDGE, _SQUARE = {"shortest_edge": 224}, {"height": 224, "width": 224}
_CLIP = _Defaults(
    size=_EDGE, mean=_CLIP_MEAN, std=_CLIP_STD, do_center_crop=True, crop_size=_SQUARE
)
_DEFAULTS: dict[ImageKind, _Defaults] = {
    "clip": _CLIP,
    "llava": _CLIP,
    "siglip": _Defaults(size=_SQUARE),
    "gemma3": _Defaults(size=_SQUARE, resample=2),
    "idefics3": _Defaults(
        size={"longest_edge": 4 * 364}, resample=1, do_image_splitting=True, default_to_square=True
    ),
    "got_ocr2": _Defaults(
        size={"height": 384, "width": 384}, mean=_CLIP_MEAN, std=_CLIP_STD, default_to_square=True
    ),
    "llava_next": replace(
        _CLIP,
        image_grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    ),
    "llava_onevision": _Defaults(
        size={"height": 384, "width": 384},
        mean=_CLIP_MEAN,
        std=_CLIP_STD,
        image_grid_pinpoints=tuple(
            (384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)
        ),
    ),
    "qwen2_vl": _Defaults(size=_PIXELS, mean=_CLIP_MEAN, std=_CLIP_STD),
    "lfm2_vl": _Defaults(
        size={"height": 512, "width": 512},
        resample=2,
        do_image_splitting=True,
        default_to_square=True,
    ),
}
_LFM2_TILE = 512
_MOST_AREA = 9  # "anyres_max_9", the only one that LLaVA-OneVision is published with
_FEWEST_PATCHES, _MOST_PATCHES = 1, 12
_TILE = {"longest_edge": 364}


def read_image_settings(
    path: Path, family: str, *, error: type[PocketVLMError] = BundleError
) -> ImageSettings:
    """Reads the image processor's settings of a folder.

    They stand in processor_config.json under `image_processor`, else in preprocessor_config.json.

    Args:
        path: A model's folder or a bundle's.
        family: The model's family, which says what a file without a type means.
        error: What is raised.

    Raises:
        PocketVLMError: `error`, with one line: they are missing, of an unknown kind, or hold a
            setting that the runtime cannot follow.
    """
    nested = path / "processor_config.json"
    if nested.is_file():
        config = read_json(nested, error=error).get("image_processor")
        if config is not None:
            return parse_image_settings(config, nested, family, error=error)
    own = path / "preprocessor_config.json"
    if own.is_file():
        return parse_image_settings(read_json(own, error=error), own, family, error=error)
    raise error(f"{path}: preprocessor_config.json (or processor_config.json) is missing")


def parse_image_settings(
    config: Any, where: Path, family: str, *, error: type[PocketVLMError] = BundleError
) -> ImageSettings:
    """Resolves the settings of one document; `read_image_settings` has the arguments."""
    if not isinstance(config, Mapping):
        raise error(f"{where}: image_processor must be an object")
    kind = _read_kind(config, where, family, error)
    try:
        stated = decode(_Settings, _without_nulls(config))
        return _check_patches(_check(_resolve(kind, where, stated), config))
    except DecodeError as fault:
        raise error(f"{where}: {fault}") from fault


def _without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a document; a null is what the library's code makes of it, no default."""
    settings: dict[str, Any] = {}
    for item in fields(_Settings):
        value = config.get(item.name)
        if value is not None:
            settings[item.name] = value
        elif item.name in config and item.type == "bool | None":
            settings[item.name] = False
    return settings


def _read_kind(
    config: Mapping[str, Any], where: Path, family: str, error: type[PocketVLMError]
) -> ImageKind:
    kinds = _FAMILY_KINDS.get(family)
    if kinds is None:  # as a manifest of anybody may say
        raise error(f"{where}: family {family!r} is unknown; known are {', '.join(_FAMILY_KINDS)}")
    name = config.get("image_processor_type")
    if name is None and config.get("feature_extractor_type") is not None:
        name = str(config["feature_extractor_type"]).replace("FeatureExtractor", "ImageProcessor")
    if name is None:
        return kinds[0]
    kind = _KINDS.get(str(name).removesuffix("Fast").removesuffix("Pil"))
    if kind is None or kind not in kinds:
        supported = ", ".join(known for known, one in _KINDS.items() if one in kinds)
        raise error(
            f"{where}: image_processor_type {name!r} is not supported for {family}; supported are "
            f"{supported}"
        )
    return kind


def _resolve(kind: ImageKind, where: Path, stated: _Settings) -> ImageSettings:
    default = _DEFAULTS[kind]
    square = _or(stated.default_to_square, default.default_to_square)
    if kind == "llava" and stated.do_pad and isinstance(stated.image_mean, float):
        raise DecodeError("image_mean must be a list where do_pad is true: it colours the border")
    if stated.pad_size is not None:
        raise DecodeError("pad_size is not supported; leave it out")
    if kind == "gemma3" and stated.do_pan_and_scan:
        raise DecodeError("do_pan_and_scan must be false: pictures are shown once, as a whole")
    for name in ("data_format", "input_data_format"):
        if getattr(stated, name) not in (None, "channels_first"):
            raise DecodeError(f"{name} must be channels_first or left out")
    size = _size("size", stated.size, default.size, is_square=square)
    if kind == "qwen2_vl":
        size = _fitted_size(stated, size)
    elif kind == "lfm2_vl":  # it has a size as well, and does not look at it
        size = dict.fromkeys(("height", "width"), _or(stated.tile_size, _LFM2_TILE))
    return ImageSettings(
        kind=kind,
        where=where,
        size=size,
        crop_size=_size("crop_size", stated.crop_size, default.crop_size, is_square=True),
        max_image_size=_or(stated.max_image_size, _TILE),
        resample=_or(stated.resample, default.resample),
        do_resize=kind == "lfm2_vl" or stated.do_resize is not False,
        do_center_crop=_or(stated.do_center_crop, default.do_center_crop),
        # Other kinds pad a batch to one size, which a picture of its own has already.
        do_pad=kind == "llava" and stated.do_pad is True,
        do_rescale=stated.do_rescale is not False,
        rescale_factor=_or(stated.rescale_factor, 1 / 255),
        do_normalize=stated.do_normalize is not False,
        image_mean=_channels("image_mean", _or(stated.image_mean, default.mean)),
        image_std=_channels("image_std", _or(stated.image_std, default.std)),
        do_convert_rgb=stated.do_convert_rgb is not False,
        do_image_splitting=kind == "got_ocr2"
        or (
            kind in ("idefics3", "lfm2_vl")
            and _or(stated.do_image_splitting, default.do_image_splitting)
        ),
        min_patches=_or(stated.min_patches, _FEWEST_PATCHES),
        max_patches=_or(stated.max_patches, _MOST_PATCHES),
        image_grid_pinpoints=_or(stated.image_grid_pinpoints, default.image_grid_pinpoints),
        min_tiles=_or(stated.min_tiles, 2),
        max_tiles=_or(stated.max_tiles, 10),
        use_thumbnail=_or(stated.use_thumbnail, True),  # noqa: FBT003  (a default)
        encoder_patch_size=_or(stated.encoder_patch_size, 16),
        downsample_factor=_or(stated.downsample_factor, 2),
        max_image_tokens=_or(stated.max_image_tokens, 256),
        max_pixels_tolerance=_or(stated.max_pixels_tolerance, 2.0),
    )


def _fitted_size(stated: _Settings, size: Mapping[str, int]) -> Mapping[str, int]:
    """The one size that pictures are fitted to: stated, or what becomes of a square of 448."""
    if stated.do_resize is False:
        raise DecodeError("do_resize must be true: pictures need one size")
    patch, merge = _or(stated.patch_size, 14), _or(stated.merge_size, 2)
    least = _or(stated.min_pixels, size.get("shortest_edge"))
    most = _or(stated.max_pixels, size.get("longest_edge"))
    if least is None or most is None:
        raise DecodeError(f"size names {_keys(size)}; it must name shortest_edge and longest_edge")
    for name, value in (("patch_size", patch), ("merge_size", merge)):
        if not 0 < value <= _WIDEST_PATCH:
            raise DecodeError(f"{name} must be 1 to {_WIDEST_PATCH}")
    if not 0 < least <= most <= _LARGEST**2:
        raise DecodeError(
            "size must name a shortest_edge of at least 1 pixel, and no shorter "
            f"longest_edge of at most {_LARGEST**2:,}"
        )
    if stated.fitted_size is None:
        side = smart_size(_SIDE, _SIDE, factor=patch * merge, least=least, most=most)
        return {"height": side[0], "width": side[1]}
    if set(stated.fitted_size) != {"height", "width"}:
        raise DecodeError("fitted_size must name height and width")
    return stated.fitted_size


def _check(settings: ImageSettings, config: Mapping[str, Any]) -> ImageSettings:
    """Refuses what does not end in pictures of one size."""
    for name, is_used in (
        ("size", settings.do_resize),
        ("resample", settings.do_resize or settings.kind == "idefics3"),
        ("crop_size", settings.do_center_crop),
        ("max_image_size", settings.kind == "idefics3"),
        ("rescale_factor", settings.do_rescale),
        ("image_mean", settings.do_normalize or settings.do_pad),
        ("image_std", settings.do_normalize),
    ):
        if is_used and name in config and config[name] is None:
            raise DecodeError(f"{name} must not be null; leave it out for the class's default")
    if settings.resample not in _RESAMPLING:
        raise DecodeError(f"resample is {settings.resample}; allowed are 0 to 5, Pillow's filters")
    if settings.do_normalize and any(
        not _SMALLEST <= abs(x) <= _LARGEST for x in settings.image_std
    ):
        raise DecodeError(f"image_std must be between {_SMALLEST} and {_LARGEST}")
    if settings.do_normalize and any(abs(x) > _LARGEST for x in settings.image_mean):
        raise DecodeError(f"image_mean must be between -{_LARGEST} and {_LARGEST}")
    if settings.do_rescale and not 0 < settings.rescale_factor <= _LARGEST:
        raise DecodeError(f"rescale_factor must be above 0 and at most {_LARGEST}")
    for name in ("size", "crop_size", "max_image_size"):
        if any(not 0 < edge <= _LARGEST for edge in getattr(settings, name).values()):
            raise DecodeError(f"{name} must be between 1 and {_LARGEST}")
    if settings.takes_any_size:
        return settings
    size, crop = settings.size, settings.crop_size
    if settings.is_anyres:
        return _check_resolutions(settings)
    if settings.kind == "idefics3":
        if set(settings.max_image_size) != {"longest_edge"}:
            raise DecodeError("max_image_size must name longest_edge")
        if settings.do_resize and set(size) not in ({"longest_edge"}, {"height", "width"}):
            raise DecodeError(
                f"size names {_keys(size)}; allowed are longest_edge, height and width"
            )
        if settings.do_image_splitting and not settings.do_resize:
            raise DecodeError("do_resize must be true where do_image_splitting is")
        if settings.most_tiles > _MOST_TILES:
            raise DecodeError(
                f"size and max_image_size cut a picture into up to {settings.most_tiles} tiles; "
                f"allowed are {_MOST_TILES}"
            )
        return settings
    if settings.do_resize and set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise DecodeError(f"size names {_keys(size)}; allowed: shortest_edge, height and width")
    if settings.do_center_crop:
        if set(crop) != {"height", "width"} or crop["height"] != crop["width"]:
            raise DecodeError("crop_size must be a square: the vision graph has one size")
        return settings
    if not settings.do_resize:
        raise DecodeError("do_resize must be true without do_center_crop: pictures need one size")
    if set(size) != {"height", "width"}:
        raise DecodeError("do_center_crop must be true where size is a shortest_edge")
    if size["height"] != size["width"]:
        raise DecodeError("size must be a square without do_center_crop")
    return settings


def _check_resolutions(settings: ImageSettings) -> ImageSettings:
    """Refuses tiles that are not all of one size."""
    size, side = settings.size, settings.side
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise DecodeError(f"size names {_keys(size)}; allowed: shortest_edge, height and width")
    edges = (*size.values(), *(settings.crop_size.values() if settings.do_center_crop else ()))
    if not settings.do_resize or any(edge != side for edge in edges):
        raise DecodeError(f"do_resize must be true, and size and crop_size a square of {side}")
    resolutions = settings.image_grid_pinpoints
    if not resolutions or any(edge < 1 or edge % side for pair in resolutions for edge in pair):
        raise DecodeError(f"image_grid_pinpoints must be heights and widths in multiples of {side}")
    _check_pixels(settings)
    if settings.most_tiles > _MOST_TILES:
        raise DecodeError(
            f"image_grid_pinpoints cut a picture into up to {settings.most_tiles} tiles; allowed "
            f"are {_MOST_TILES}"
        )
    return settings


def _check_patches(settings: ImageSettings) -> ImageSettings:
    """Refuses grids of the GotOcr2 and LFM2-VL kinds that are none or too large."""
    if settings.kind == "got_ocr2":
        names, fewest, most = "patches", settings.min_patches, settings.max_patches
    elif settings.kind == "lfm2_vl":
        names, fewest, most = "tiles", settings.min_tiles, settings.max_tiles
        _check_units(settings)
    else:
        return settings
    if not 1 <= fewest <= most < _MOST_TILES:
        raise DecodeError(
            f"min_{names} and max_{names} are {fewest} and {most}; allowed are 1 to "
            f"{_MOST_TILES - 1}, the smaller first"
        )
    if settings.do_center_crop:
        raise DecodeError("do_center_crop must be false: pictures are cut into tiles")
    _check_pixels(settings)
    return settings


def _check_units(settings: ImageSettings) -> None:
    """Refuses tiles of the LFM2-VL kind that do not hold whole visual tokens."""
    unit = settings.encoder_patch_size * settings.downsample_factor
    if unit < 1 or settings.side % unit:
        raise DecodeError(
            "tile_size must be a multiple of encoder_patch_size x downsample_factor, and is "
            f"{settings.side}"
        )
    if not 1 <= settings.max_image_tokens <= _LARGEST or not settings.max_pixels_tolerance > 0:
        raise DecodeError("max_image_tokens and max_pixels_tolerance must be above 0")


def _check_pixels(settings: ImageSettings) -> None:
    """Refuses tiles that are a larger picture, side by side, than any file may hold."""
    side, tiles = settings.side, settings.most_tiles - 1
    if side**2 * tiles > MAX_PIXELS:
        raise DecodeError(f"{tiles} tiles of {side} x {side} are more than {MAX_PIXELS:,} pixels")


def _or(stated: Any, default: Any) -> Any:
    return default if stated is None else stated


def _keys(size: Mapping[str, int]) -> str:
    return " and ".join(size) or "nothing"


def _size(
    name: str, stated: Size | None, default: Mapping[str, int], *, is_square: bool
) -> Mapping[str, int]:
    """A size as a dictionary: a number alone is a square's side or the shortest edge."""
    if stated is None:
        return default
    if isinstance(stated, int):
        return {"height": stated, "width": stated} if is_square else {"shortest_edge": stated}
    if isinstance(stated, Mapping):
        return stated
    if len(stated) != 2:  # noqa: PLR2004  (height and width)
        raise DecodeError(f"{name} must have two numbers, height and width")
    return {"height": stated[0], "width": stated[1]}


def _channels(name: str, stated: float | tuple[float, ...]) -> tuple[float, ...]:
    if isinstance(stated, int | float):
        return (float(stated),) * _CHANNELS
    if len(stated) != _CHANNELS:
        raise DecodeError(f"{name} must have {_CHANNELS} numbers")
    return stated
