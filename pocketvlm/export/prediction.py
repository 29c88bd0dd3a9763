"""What a target says of a model before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Prediction"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a target would make of a model.

    Attributes:
        part_bytes: Bytes by part of the model, and `other` for what is no weight matrix.
        refused: What it cannot run, each with what would work.
        warnings: What it can run at a price.
    """

    part_bytes: Mapping[str, int]
    refused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
