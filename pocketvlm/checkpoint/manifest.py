"""Manifest of a saved checkpoint: pocketvlm.json, read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pocketvlm.errors import CheckpointError
from pocketvlm.json_io import read_json
from pocketvlm.modelspec import ModelSpec
from pocketvlm.reduction import TokenReducer

__all__ = [
    "CHECKPOINT_SCHEMA",
    "MANIFEST",
    "ReducerBuilder",
    "read_manifest",
    "read_visual_layers",
    "restore_reducer",
]

CHECKPOINT_SCHEMA = 1
MANIFEST = "pocketvlm.json"

ReducerBuilder = Callable[[Mapping[str, Any], ModelSpec], TokenReducer]


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a directory that `Checkpoint.save` wrote, `None` for a foreign one."""
    return read_json(path / MANIFEST) if (path / MANIFEST).is_file() else None


def restore_reducer(
    manifest: Mapping[str, Any],
    spec: ModelSpec,
    reducers: Mapping[str, ReducerBuilder],
    path: Path,
) -> TokenReducer | None:
    """The visual-token reduction of a saved checkpoint.

    Raises:
        CheckpointError: Its method is not among `reducers`.
    """
    stored = manifest.get("reducer")
    if stored is None:
        return None
    if stored["method"] not in reducers:
        raise CheckpointError(
            f"{path}: reduces visual tokens by {stored['method']!r}, which is not known here; "
            "load it with pocketvlm.load_checkpoint"
        )
    return reducers[stored["method"]](stored["parameters"], spec)


def read_visual_layers(manifest: Mapping[str, Any], spec: ModelSpec, path: Path) -> int | None:
    """How many layers of a saved checkpoint visual tokens run through.

    Raises:
        CheckpointError: The stored number is none of the decoder's.
    """
    stored = manifest.get("visual_layers")
    if stored is None:
        return None
    if not isinstance(stored, int) or not 0 < stored < spec.decoder.depth:
        raise CheckpointError(
            f"{path / MANIFEST}: visual_layers is {stored!r}; allowed are 1 to "
            f"{spec.decoder.depth - 1}, or null"
        )
    return stored
