"""Saves a checkpoint's tensors, processor and history as a directory that can be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pocketvlm.checkpoint.load import CACHE_PREFIX
from pocketvlm.checkpoint.manifest import StoredReducer, write_manifest
from pocketvlm.errors import CheckpointError
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.modules import FormEmbedding, FormLinear

if TYPE_CHECKING:
    from pocketvlm.checkpoint.checkpoint import Checkpoint

__all__ = ["write_checkpoint"]

_WEIGHTS = "model.safetensors"


def write_checkpoint(checkpoint: Checkpoint, folder: Path, path: Path) -> None:
    """Writes everything that `Checkpoint.load` reads.

    Args:
        checkpoint: The checkpoint.
        folder: The folder that is written.
        path: The final path of the folder, for messages.

    Raises:
        CheckpointError: The weights cannot be written.
    """
    (folder / "config.json").write_text(
        json.dumps(checkpoint.config, indent=2) + "\n", encoding="utf-8"
    )
    checkpoint.processor.save(folder)
    tensors, forms = _stored_tensors(checkpoint)
    try:
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library wraps an operating system's error, such as a full disk, in its own.
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    reducing = [r for r in checkpoint.history if checkpoint.reducer and "keep" in r.metrics]
    write_manifest(
        folder,
        source=checkpoint.source,
        forms=forms,
        reducer=(
            StoredReducer(method=reducing[-1].method, parameters=dict(reducing[-1].parameters))
            if reducing
            else None
        ),
        other_sizes=checkpoint.other_sizes,
        visual_schedule=checkpoint.visual_schedule,
        token_merges=checkpoint.spec.tower.merges,
        tile_budget=checkpoint.tile_budget,
        history=checkpoint.history,
    )


def _stored_tensors(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    forms: dict[str, Any] = {}
    # A codebook shared by several layers is one tensor, stored with the first of them.
    owners: dict[int, str] = {}
    tied = checkpoint.spec.decoder.head if checkpoint.spec.decoder.tied_head else None
    for name, module in checkpoint.model.named_modules():
        if isinstance(module, FormLinear | FormEmbedding) and name != tied:
            shared: dict[str, str] = {}
            for key, value in module.form.to_tensors().items():
                owner = owners.setdefault(value.data_ptr(), f"{name}.{key}")
                if owner == f"{name}.{key}":
                    tensors[owner] = value
                else:
                    shared[key] = owner
            if not isinstance(module.form, DenseWeight):
                forms[name] = module.form.to_metadata()
                if shared:
                    forms[name]["shared"] = shared
    for name, parameter in checkpoint.model.named_parameters():
        tensors[name] = parameter.detach()
    if checkpoint.cache_grid is not None:
        tensors |= {
            CACHE_PREFIX + key: value for key, value in checkpoint.cache_grid.to_tensors().items()
        }
    return {name: tensors[name].contiguous() for name in sorted(tensors)}, forms
