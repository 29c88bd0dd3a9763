"""Model folder: what a directory holds, resolved from its headers before any weight is loaded.

`plan` and `Checkpoint.load` read a folder through this one function: which files count, which
weight each tensor is, whether the head is tied to the embedding table, what is missing, and what
is left out. Stock transformers decides each of these; where it continues after a warning, so does
this, with a note, except that it never continues with weights that it would have to invent.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketvlm.checkpoint.config import (
    nest_config,
    read_config,
    read_spec,
    read_spec_and_ignored,
)
from pocketvlm.checkpoint.manifest import CheckpointManifest, read_manifest
from pocketvlm.checkpoint.names import split_layer, stock_names
from pocketvlm.checkpoint.tensors import (
    FLOAT_TYPES,
    StoredTensor,
    check_shape,
    hold_equal,
    read_headers,
    tensors_equal,
)
from pocketvlm.checkpoint.weight_files import find_weight_files
from pocketvlm.errors import CheckpointError, name_some
from pocketvlm.models.spec import ModelSpec
from pocketvlm.processor.foreign_code import plain_config
from pocketvlm.weights.formats import StoredLayout, read_stored_layout

__all__ = ["ModelFolder", "read_model_folder"]


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What a model's directory holds.

    Attributes:
        path: The directory.
        config: Content of config.json; `tie_word_embeddings` is false if the head is not tied.
        spec: The model's specification.
        manifest: pocketvlm.json of a directory that `Checkpoint.save` wrote, else `None`.
        layout: How another tool stored its quantized layers, or `None`.
        files: The weight files.
        tensors: Every tensor that has a place in the model, by its current name.
        notes: What is ignored, or differs from what the directory's own files say.
    """

    path: Path
    config: Mapping[str, Any]
    spec: ModelSpec
    manifest: CheckpointManifest | None
    layout: StoredLayout | None
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...]


def read_model_folder(path: Path) -> ModelFolder:
    """Reads a Hugging Face directory, or a saved checkpoint, up to the headers of its weight files.

    Raises:
        CheckpointError: The directory is missing or damaged, holds pickled weights only, or lacks
            a weight that is run.
        UnsupportedError: The model's family, or an option of it, is not supported.
    """
    config, notes = plain_config(read_config(path))
    spec, ignored = read_spec_and_ignored(config)
    config = nest_config(config)
    if ignored:
        notes += (
            "config.json: keys that stock transformers does not know are ignored, as it ignores "
            f"them: {name_some(ignored)}",
        )
    manifest = read_manifest(path)
    layout = None if manifest else read_stored_layout(config)
    weights = find_weight_files(path, config)
    stored = read_headers(weights.files, weights.placed)
    folder = ModelFolder(
        path=path,
        config=config,
        spec=spec,
        manifest=manifest,
        layout=layout,
        files=weights.files,
        tensors=stored,
        notes=(*notes, *weights.notes),
    )
    # What this package wrote has current names and nothing else in it.
    return folder if manifest else _settle(folder)


def _settle(folder: ModelFolder) -> ModelFolder:
    names, expected = stock_names(folder.config, folder.tensors)
    tensors: dict[str, StoredTensor] = {}
    unplaced: list[str] = []
    quantized = _quantized_layers(filter(None, names.values()), expected, folder.layout)
    for key, name in names.items():
        if name is None or (name not in expected and _layer_of(name, expected)[0] not in quantized):
            unplaced.append(key)
        elif name in tensors:
            hold_equal(tensors[name], folder.tensors[key])
        else:
            tensors[name] = folder.tensors[key]
    folder = _settle_head(replace(folder, tensors=tensors))
    notes = list(folder.notes)
    if unplaced:
        notes.append(
            f"tensors that have no place in a {folder.spec.model_type} model are ignored, as stock "
            f"transformers ignores them: {name_some(sorted(unplaced))}"
        )
    notes += _check_weights(folder, expected, quantized)
    return replace(folder, notes=tuple(notes))


def _settle_head(folder: ModelFolder) -> ModelFolder:
    """Ties and unties as stock does: by what the files hold if config.json says to tie."""
    decoder = folder.spec.decoder
    if not decoder.tied_head:
        return folder
    head, table = f"{decoder.head}.weight", f"{decoder.embedding}.weight"
    tensors = dict(folder.tensors)
    own = tensors.pop(head, None)
    if own is None:
        return folder
    if table not in tensors:  # either name may hold what both share
        tensors[table] = own
    elif not tensors_equal(own, tensors[table]):
        config = {**folder.config, "tie_word_embeddings": False}
        text = config.get("text_config")
        if isinstance(text, Mapping) and "tie_word_embeddings" in text:
            config["text_config"] = {**text, "tie_word_embeddings": False}
        note = (
            "config.json ties the head to the embedding table, but the weights hold a separate "
            "head, which is used, as stock transformers does"
        )
        return replace(folder, config=config, spec=read_spec(config), notes=(*folder.notes, note))
    return replace(folder, tensors=tensors)


def _check_weights(
    folder: ModelFolder, expected: Mapping[str, tuple[int, ...]], quantized: Container[str]
) -> list[str]:
    """Checks the shape of every weight; only weights that are never run may be missing."""
    spec = folder.spec
    head = f"{spec.decoder.head}.weight" if spec.decoder.tied_head else None
    unused: list[str] = []
    for name, shape in expected.items():
        stored = folder.tensors.get(name)
        if stored is not None:
            if stored.dtype not in FLOAT_TYPES:
                raise CheckpointError(
                    f"{stored.file}: tensor {stored.key} is of type {stored.dtype}; allowed are "
                    f"{', '.join(FLOAT_TYPES)}"
                )
            check_shape(f"{stored.key} of {stored.file}", stored.shape, shape)
        elif name == head or name.removesuffix(".weight") in quantized:
            continue
        elif spec.runs(name):
            raise CheckpointError(f"{folder.path}: tensor {name} is missing from the weights")
        else:
            unused.append(name)
    if not unused:
        return []
    return [f"weights that are never run are missing, and are stored as zeros: {name_some(unused)}"]


def _quantized_layers(
    names: Iterable[str], expected: Container[str], layout: StoredLayout | None
) -> set[str]:
    """Layers that another tool quantized."""
    if layout is None:
        return set()
    layers: dict[str, list[str]] = {}
    for name in names:
        layer, rest = _layer_of(name, expected)
        if rest != "bias":
            layers.setdefault(layer, []).append(rest)
    return {layer for layer, parts in layers.items() if layout.holds(parts)}


def _layer_of(name: str, expected: Container[str]) -> tuple[str, str]:
    """The layer that a tensor is part of, and the name of the part."""
    return next((x for x in split_layer(name) if f"{x[0]}.weight" in expected), (name, ""))
