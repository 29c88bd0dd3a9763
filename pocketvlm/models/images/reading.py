"""Reading: image settings from a folder, resolved as stock transformers resolves them.

Which file counts, what a missing value stands for and how a size may be written are the library's
rules (its Pillow backend). The checkpoint side asks them what it is about to lose, the runtime
turns pictures into pixels by them. Whatever the runtime could not follow exactly is refused here,
by the name of the setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from pocketvlm.errors import BundleError, PocketVLMError
from pocketvlm.json_io import DecodeError, decode, read_json
from pocketvlm.models.images.clip import (
    ClipDocument,
    Gemma3Document,
    LlavaDocument,
    SiglipDocument,
)
from pocketvlm.models.images.document import LARGEST
from pocketvlm.models.images.empty_tiles import SMALLEST_TILE, EmptyTiles
from pocketvlm.models.images.got_ocr2 import GotOcr2Document
from pocketvlm.models.images.idefics3 import Idefics3Document
from pocketvlm.models.images.lfm2_vl import Lfm2VlDocument
from pocketvlm.models.images.llava_next import LlavaNextDocument, LlavaOnevisionDocument
from pocketvlm.models.images.qwen2_vl import (
    Glm46vDocument,
    PaddleOcrVlDocument,
    Qwen2VlDocument,
)
from pocketvlm.models.images.settings import Geometry, ImageSettings
from pocketvlm.models.images.tilings import Anyres, AspectGrid, SplitGrid

__all__ = ["IMAGE_SETTINGS_FILES", "parse_image_settings", "read_image_settings"]

IMAGE_SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files of a folder that may hold them."""

_Document = (
    ClipDocument  # and what is derived of it
    | Idefics3Document
    | GotOcr2Document
    | Lfm2VlDocument
    | LlavaNextDocument
    | Qwen2VlDocument  # likewise
)
_KINDS: Mapping[str, type[_Document]] = {
    "CLIPImageProcessor": ClipDocument,
    "LlavaImageProcessor": LlavaDocument,
    "SiglipImageProcessor": SiglipDocument,
    "Idefics3ImageProcessor": Idefics3Document,
    "SmolVLMImageProcessor": Idefics3Document,
    "GotOcr2ImageProcessor": GotOcr2Document,
    "Lfm2VlImageProcessor": Lfm2VlDocument,
    "LlavaNextImageProcessor": LlavaNextDocument,
    "LlavaOnevisionImageProcessor": LlavaOnevisionDocument,
    "Qwen2VLImageProcessor": Qwen2VlDocument,
    "Glm46VImageProcessor": Glm46vDocument,
    "PaddleOCRVLImageProcessor": PaddleOcrVlDocument,
    "Gemma3ImageProcessor": Gemma3Document,
}
"""Kinds by the library's classes."""

_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "llava": ("LlavaImageProcessor", "CLIPImageProcessor", "SiglipImageProcessor"),
    "idefics3": ("Idefics3ImageProcessor", "SmolVLMImageProcessor"),
    "internvl": ("GotOcr2ImageProcessor",),
    "lfm2_vl": ("Lfm2VlImageProcessor",),
    "llava_next": ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor"),
    "qwen_vl": ("Qwen2VLImageProcessor",),
    "glm_ocr": ("Glm46VImageProcessor",),
    "paddleocr_vl": ("PaddleOCRVLImageProcessor",),
    "paligemma": ("SiglipImageProcessor",),
    "gemma3": ("Gemma3ImageProcessor",),
}
"""Classes that a family's processor works with; the first is the one of a file without a type.

A bundle knows its family's name alone, which is why no `ProcessorSpec` holds these.
"""

_RESAMPLING = range(6)
_SMALLEST = 1e-6


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
        document = decode(kind, _without_nulls(kind, config))
        _check(document, config)
        _check_others(kind, config)
        geometry = document.geometry()
        _check_rule(document, geometry)
        return ImageSettings(
            where=where,
            geometry=geometry,
            empty_tiles=_read_empty_tiles(document, geometry),
            resample=document.resample,
            do_rescale=document.do_rescale,
            rescale_factor=document.rescale_factor,
            do_normalize=document.do_normalize,
            image_mean=document.means,
            image_std=document.deviations,
            do_convert_rgb=document.do_convert_rgb,
        )
    except DecodeError as fault:
        raise error(f"{where}: {fault}") from fault


def _read_kind(
    config: Mapping[str, Any], where: Path, family: str, error: type[PocketVLMError]
) -> type[_Document]:
    own = _FAMILIES.get(family)
    if own is None:  # as a manifest of anybody may say
        raise error(f"{where}: family {family!r} is unknown; known are {', '.join(_FAMILIES)}")
    stated = config.get("image_processor_type")
    if stated is None and config.get("feature_extractor_type") is not None:
        stated = str(config["feature_extractor_type"]).replace("FeatureExtractor", "ImageProcessor")
    if stated is None:
        return _KINDS[own[0]]
    name = str(stated).removesuffix("Fast").removesuffix("Pil")
    if name not in own:
        raise error(
            f"{where}: image_processor_type {stated!r} is not supported for {family}; supported "
            f"are {', '.join(known for known in _KINDS if known in own)}"
        )
    return _KINDS[name]


def _without_nulls(kind: type[_Document], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a document; a null is what the library's code makes of it, no default."""
    settings: dict[str, Any] = {}
    for item in fields(kind):
        value = config.get(item.name)
        if value is not None:
            settings[item.name] = value
        elif item.name in config and item.type == "bool":
            settings[item.name] = False
    return settings


def _check_others(kind: type[_Document], config: Mapping[str, Any]) -> None:
    """Refuses settings of other kinds that are of no type that any of them takes.

    This kind does not follow them, as its class does not; but a file with such a value was written
    by mistake.
    """
    own = {item.name for item in fields(kind)}
    hints = [get_type_hints(other) for other in dict.fromkeys(_KINDS.values())]
    for name, value in config.items():
        faults: list[DecodeError] = []
        types = [] if name in own or value is None else [h[name] for h in hints if name in h]
        for expected in types:
            try:
                decode(expected, value, name)
            except DecodeError as fault:
                faults.append(fault)
        if types and len(faults) == len(types):
            raise faults[0]


def _check_rule(document: _Document, geometry: Geometry) -> None:
    """Refuses rules and grids where the library's class cannot be told them of one picture."""
    if document.grid_rule is not None and not isinstance(geometry.tiling, SplitGrid | Anyres):
        raise DecodeError(
            "grid_rule is followed where pictures are cut as Idefics3 or LLaVA-NeXT cut them, and "
            "these are not"
        )
    if document.second_grid is not None and not isinstance(geometry.tiling, AspectGrid):
        raise DecodeError(
            "second_grid is followed where pictures are cut as InternVL cuts them, and these are "
            "not"
        )


def _read_empty_tiles(document: _Document, geometry: Geometry) -> EmptyTiles | None:
    """What leaves out tiles that show nothing; refused where there is nothing to leave out."""
    empty_tiles, tiling = document.empty_tiles, geometry.tiling
    if empty_tiles is None:
        return None
    if tiling is None or not tiling.has_whole:
        raise DecodeError(
            "empty_tile_contrast is stated, and pictures are not cut into tiles that the whole "
            "picture comes with"
        )
    if min(geometry.picture_size) < SMALLEST_TILE:
        raise DecodeError(f"empty_tile_contrast needs tiles of {SMALLEST_TILE} pixels or more")
    return empty_tiles


def _check(document: _Document, config: Mapping[str, Any]) -> None:
    """Refuses what no kind follows."""
    if document.pad_size is not None:
        raise DecodeError("pad_size is not supported; leave it out")
    for name, value in (
        ("data_format", document.data_format),
        ("input_data_format", document.input_data_format),
    ):
        if value not in (None, "channels_first"):
            raise DecodeError(f"{name} must be channels_first or left out")
    for name in sorted(document.needed):
        if name in config and config[name] is None:
            raise DecodeError(f"{name} must not be null; leave it out for the class's default")
    if document.resample not in _RESAMPLING:
        raise DecodeError(f"resample is {document.resample}; allowed are 0 to 5, Pillow's filters")
    if document.do_normalize and any(
        not _SMALLEST <= abs(x) <= LARGEST for x in document.deviations
    ):
        raise DecodeError(f"image_std must be between {_SMALLEST} and {LARGEST}")
    if "image_mean" in document.needed and any(abs(x) > LARGEST for x in document.means):
        raise DecodeError(f"image_mean must be between -{LARGEST} and {LARGEST}")
    if document.do_rescale and not 0 < document.rescale_factor <= LARGEST:
        raise DecodeError(f"rescale_factor must be above 0 and at most {LARGEST}")
