"""Shapes: sizes of published models, as data without a weight.

A shape is what a repository says about its model: config.json as transformers 5 writes it, and the
settings of its processor. A plan asks for nothing else; where weights are needed, seeded random
ones of the same sizes are written (`reference.random_models`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pocketvlm.errors import CheckpointError
from pocketvlm.json_io import read_json
from pocketvlm.models.families.table import read_model_spec
from pocketvlm.models.images.reading import parse_image_settings
from pocketvlm.models.spec import ModelSpec

__all__ = ["Shape", "list_shapes", "load_shape"]

_FOLDER = Path(__file__).parent
_TOKENIZER_ROW_BYTES = 72
"""Bytes of tokenizer.json for one row of the table, within a factor of two of published ones."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One published model without its weights.

    Attributes:
        name: What follows `shape:` on the command line.
        source: The repository that has this shape.
        config: Content of its config.json.
        processor: Content of its processor_config.json, with the image processor in it.
    """

    name: str
    source: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's specification, and how its processor cuts pictures.

        The library is not asked for defaults, which would take longer than a plan: every key that a
        reader asks for stands in the shape.
        """
        spec = read_model_spec(self.config)
        settings = parse_image_settings(
            self.processor["image_processor"],
            Path(f"shape:{self.name}"),
            spec.family,
            error=CheckpointError,
        )
        return replace(spec, tiling=settings.tiling)

    @property
    def text_bytes(self) -> int:
        """Predicted bytes of the tokenizer's files."""
        return self.spec.decoder.vocab_size * _TOKENIZER_ROW_BYTES


def list_shapes() -> tuple[str, ...]:
    """Names of all shapes."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))


def load_shape(name: str) -> Shape:
    """The shape of this name.

    Raises:
        CheckpointError: There is none.
    """
    if name not in list_shapes():
        raise CheckpointError(f"shape {name!r} is not known; there are {', '.join(list_shapes())}")
    document = read_json(_FOLDER / f"{name}.json", error=CheckpointError)
    return Shape(name=name, **document)
