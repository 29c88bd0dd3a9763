"""Manifest of a saved checkpoint: pocketvlm.json, which signs every file next to it.

Versions before schema 2 signed the weights alone: a changed template, tokenizer or history of such
a directory could not be told from the one that was saved, so they are no longer read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pocketvlm.bundle import TileBudget, VisualSchedule
from pocketvlm.checkpoint.records import Source, StageRecord, timeless
from pocketvlm.checkpoint.vision import Vision, combine_vision
from pocketvlm.errors import CheckpointError
from pocketvlm.files.reader import locate
from pocketvlm.files.signed_folder import (
    DIGEST_KEY,
    sign_document,
    sign_files,
    verify_document,
    verify_files,
)
from pocketvlm.json_io import DecodeError, decode, read_json, write_json
from pocketvlm.models.picture_size import PictureSize
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.models.token_merging import TokenMerge

__all__ = [
    "CHECKPOINT_SCHEMA",
    "CheckpointManifest",
    "ReducerBuilder",
    "StoredReducer",
    "read_manifest",
    "read_schedule",
    "read_tile_budget",
    "restore_vision",
    "with_token_merges",
    "write_manifest",
]

CHECKPOINT_SCHEMA = 2
_MANIFEST = "pocketvlm.json"
_UNSIGNED = ("README.md", ".gitattributes")

ReducerBuilder = Callable[[Mapping[str, Any], ModelSpec], Sequence[TokenReducer]]
"""The reductions that a stage of these parameters gives a model, one for each vision graph."""


@dataclass(frozen=True, kw_only=True)
class StoredReducer:
    """A visual-token reduction: the stage that built it, and with which parameters."""

    method: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """The description of a saved checkpoint.

    Attributes:
        source: Where the weights came from.
        forms: How each weight is stored, by the layer's name; dense ones are left out.
        reducer: The visual-token reduction, or `None` for all tokens.
        visual_schedule: Where visual rows leave the decoder, or `None` where they do not.
        other_sizes: Sizes of pictures beside the processor's, for which there are vision graphs.
        token_merges: Where tokens are merged within the tower.
        tile_budget: Which vision graph sees which tile of a picture, where they differ.
        history: One record per stage, in order.
        files: sha256 of every other file of the directory.
        schema: Version of this description.
    """

    source: Source
    forms: Mapping[str, Mapping[str, Any]]
    reducer: StoredReducer | None
    visual_schedule: VisualSchedule | None
    history: tuple[StageRecord, ...]
    files: Mapping[str, str]
    other_sizes: tuple[PictureSize, ...] = ()
    token_merges: tuple[TokenMerge, ...] = ()
    tile_budget: TileBudget | None = None
    schema: int = CHECKPOINT_SCHEMA


def read_manifest(path: Path) -> CheckpointManifest | None:
    """The manifest of a directory that `Checkpoint.save` wrote, `None` for a foreign one.

    Raises:
        CheckpointError: It cannot be read, is of an earlier version, or the directory was changed
            after it was signed.
    """
    file = path / _MANIFEST
    if not file.exists() and not file.is_symlink():
        return None
    document = read_json(locate(path, _MANIFEST, error=CheckpointError), error=CheckpointError)
    if document.get("schema") != CHECKPOINT_SCHEMA or DIGEST_KEY not in document:
        raise CheckpointError(
            f"{file}: schema {document.get('schema')!r}; this version reads {CHECKPOINT_SCHEMA}, "
            "where every file is signed: save the checkpoint again with this version"
        )
    verify_document(document, file, error=CheckpointError)
    try:
        manifest = decode(
            CheckpointManifest, {key: value for key, value in document.items() if key != DIGEST_KEY}
        )
    except DecodeError as error:
        raise CheckpointError(f"{file}: {error}") from error
    verify_files(path, manifest.files, _MANIFEST, _UNSIGNED, error=CheckpointError)
    return manifest


def write_manifest(
    folder: Path,
    *,
    source: Source,
    forms: Mapping[str, Mapping[str, Any]],
    reducer: StoredReducer | None,
    other_sizes: tuple[PictureSize, ...],
    visual_schedule: VisualSchedule | None,
    token_merges: tuple[TokenMerge, ...],
    tile_budget: TileBudget | None,
    history: tuple[StageRecord, ...],
) -> None:
    """Signs every file of a folder; timings are left out of its history."""
    manifest = CheckpointManifest(
        source=source,
        forms=forms,
        reducer=reducer,
        other_sizes=other_sizes,
        visual_schedule=visual_schedule,
        token_merges=token_merges,
        tile_budget=tile_budget,
        history=(),
        files=sign_files(folder, (_MANIFEST, *_UNSIGNED)),
    )
    document = {**asdict(manifest), "history": [timeless(record) for record in history]}
    write_json(folder / _MANIFEST, sign_document(document))


def restore_vision(
    manifest: CheckpointManifest,
    spec: ModelSpec,
    reducers: Mapping[str, ReducerBuilder],
    path: Path,
) -> tuple[Vision, ...]:
    """The vision graphs of a saved checkpoint, its own first.

    Raises:
        CheckpointError: The method that reduces visual tokens is not among `reducers`, or does not
            take its parameters; or a size does not fit the model.
    """
    stored = manifest.reducer
    if stored is None:
        return combine_vision(spec, manifest.other_sizes, lambda _: (None,))
    if stored.method not in reducers:
        raise CheckpointError(
            f"{path}: reduces visual tokens by {stored.method!r}, which is not known here; "
            "load it with pocketvlm.load_checkpoint"
        )
    build = partial(reducers[stored.method], stored.parameters)
    try:
        return combine_vision(spec, manifest.other_sizes, build)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path / _MANIFEST}: reducer.parameters do not fit {stored.method}: {error}"
        ) from error


def read_tile_budget(
    manifest: CheckpointManifest, visions: Sequence[Vision], path: Path
) -> TileBudget | None:
    """Which vision graph of a saved checkpoint sees which tile.

    Raises:
        CheckpointError: There is none that keeps one of its numbers of tokens.
    """
    budget = manifest.tile_budget
    if budget is not None:
        kept = {vision.reducer.keep for vision in visions if vision.reducer is not None}
        missing = [count for count in budget.counts if count not in kept]
        if missing:
            raise CheckpointError(
                f"{path / _MANIFEST}: tile_budget: no vision graph keeps "
                f"{', '.join(map(str, missing))} visual tokens"
            )
    return budget


def with_token_merges(spec: ModelSpec, manifest: CheckpointManifest, path: Path) -> ModelSpec:
    """A saved checkpoint's specification, with the tokens that its tower merges.

    Raises:
        CheckpointError: The tower has no such blocks or patches.
    """
    if not manifest.token_merges:
        return spec
    try:
        return spec.with_token_merges(manifest.token_merges)
    except CheckpointError as error:
        raise CheckpointError(f"{path / _MANIFEST}: token_merges: {error}") from error


def read_schedule(
    manifest: CheckpointManifest, spec: ModelSpec, path: Path
) -> VisualSchedule | None:
    """Where visual rows leave the decoder of a saved checkpoint.

    Raises:
        CheckpointError: The schedule does not fit the decoder.
    """
    schedule = manifest.visual_schedule
    if schedule is not None:
        try:
            schedule.require_depth(spec.decoder.depth)
        except ValueError as error:
            raise CheckpointError(f"{path / _MANIFEST}: visual_schedule: {error}") from error
    return schedule
