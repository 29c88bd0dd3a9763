"""What a bundle's graphs compute and hold, counted: a file of the bundle, beside its manifest.

`plan` predicts from these counts before there is a bundle; `bench` reads them where the bundle is,
without torch and without the specification that they were counted from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.prediction.costs import ExportedModel, vision_operators
from pocketvlm.device_bench.prediction.decoder_memory import DecoderMemory
from pocketvlm.device_bench.prediction.decoder_work import DecoderWork, count_decoder
from pocketvlm.device_bench.prediction.operators import Work, add_up
from pocketvlm.errors import BundleError
from pocketvlm.json_io import DecodeError, decode, encode, read_json, write_json

__all__ = ["BundleWork", "ModelWork", "VisionWork", "count_work", "read_work", "write_work"]

_FILE = "work.json"
_SCHEMA = 2
_MOST_BYTES = 2**50
_MOST_PIXELS = 2**28


@dataclass(frozen=True, kw_only=True)
class VisionWork:
    """A vision graph, for one tile.

    Attributes:
        work: Its operators.
        tile_pixels: Pixels of the tile.
    """

    work: Work
    tile_pixels: int

    def __post_init__(self) -> None:
        if not 1 <= self.tile_pixels <= _MOST_PIXELS:
            raise ValueError(f"tile_pixels must be 1 to {_MOST_PIXELS:,}")


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """All graphs but the lookup of embeddings.

    Attributes:
        visions: The vision graphs, in the manifest's order.
        decoder: The decoder.
    """

    visions: tuple[VisionWork, ...]
    decoder: DecoderWork


@dataclass(frozen=True, kw_only=True)
class BundleWork:
    """What is predicted of a bundle without a rate.

    Attributes:
        model: What its graphs compute; why no kernel is known for it, where that is so.
        weight_bytes: Weights in memory once they are loaded, by target.
        activation_bytes: Activations at their peak, of each vision graph.
        decoder: Activations of the decoder, by the rows of a call.
        schema: Version of the file.
    """

    model: ModelWork | str
    weight_bytes: Mapping[str, int]
    activation_bytes: tuple[int, ...]
    decoder: DecoderMemory
    schema: int = _SCHEMA

    def __post_init__(self) -> None:
        for count in (*self.weight_bytes.values(), *self.activation_bytes):
            if not 0 <= count <= _MOST_BYTES:
                raise ValueError(f"numbers of bytes must be 0 to {_MOST_BYTES:,}")


def count_work(*models: ExportedModel) -> ModelWork:
    """Counts a model.

    Args:
        models: The model with each of its vision graphs; one where there is one.
    """
    return ModelWork(
        visions=tuple(
            VisionWork(
                work=add_up(vision_operators(model)),
                tile_pixels=model.spec.tower.height * model.spec.tower.width,
            )
            for model in models
        ),
        decoder=count_decoder(models[0]),
    )


def write_work(work: BundleWork, folder: Path) -> None:
    """Writes the file, before the folder is signed."""
    write_json(folder / _FILE, encode(work))


def read_work(bundle: Bundle) -> BundleWork | str:
    """What a bundle says of its work; why nothing can be predicted of it, where it says nothing.

    Raises:
        BundleError: The file is damaged.
    """
    if not bundle.has(_FILE):
        return f"{bundle.path}: has no {_FILE}; an export by this version writes one"
    file = bundle.file(_FILE)
    document = read_json(file, error=BundleError)
    if document.get("schema") != _SCHEMA:
        return (
            f"{file}: schema {document.get('schema')!r}, and this version reads {_SCHEMA}; "
            "export again"
        )
    try:
        work = decode(BundleWork, document)
    except DecodeError as error:
        raise BundleError(f"{file}: not the work of a bundle: {error}") from error
    graphs = len(bundle.each_vision())
    counted = graphs if isinstance(work.model, str) else len(work.model.visions)
    if not counted == len(work.activation_bytes) == graphs:
        raise BundleError(f"{file}: is not about the {graphs} vision graphs of the manifest")
    for target in {component.target for component in bundle.manifest.components}:
        if target not in work.weight_bytes:
            raise BundleError(f"{file}: weight_bytes lacks {target}")
    return work
