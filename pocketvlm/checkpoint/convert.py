"""Writes a checkpoint in a layout that other tools read: one directory, stock tensor names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pocketvlm.checkpoint.checkpoint import Checkpoint
from pocketvlm.checkpoint.layouts import LAYOUTS, QUANTIZER, Layers, Layout
from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.files.publish import replace_directory
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.modules import FormEmbedding, FormLinear

__all__ = ["SavedLayout", "save_layout"]

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class SavedLayout:
    """What `save_layout` wrote.

    Attributes:
        layout: Name of the layout.
        quantized: Layers that keep their codes.
        dense: Weight matrices that the layout stores as float, with their type.
        weight_bytes: Bytes of the weight file.
        notes: What the layout could not hold, and what readers may stumble over.
    """

    layout: str
    quantized: tuple[str, ...]
    dense: Mapping[str, str]
    weight_bytes: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values of every field."""
        return asdict(self)


def save_layout(checkpoint: Checkpoint, path: Path | str, *, layout: str) -> SavedLayout:
    """Writes a checkpoint in the layout of another tool; replaces `path` only when complete.

    Codes, scales and codebooks are those of the checkpoint. Layers that the layout holds dense,
    including the token embedding, are stored in the narrowest lossless float type.

    Args:
        checkpoint: A checkpoint with quantized linear layers.
        path: A folder that does not exist, is empty, or was written here before.
        layout: One of `LAYOUTS`: `gptq` stores zero points minus one, `gptq_v2` as they are,
            `compressed-tensors` is its pack-quantized format, `vptq` holds codebooks.

    Raises:
        UnsupportedError: No layer is quantized, one has a form that the layout cannot hold, or
            tensors of the model were folded.
        CheckpointError: `path` holds something else, or cannot be written.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise UnsupportedError(f"layout {layout!r} is not known; known are {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[layout]
    if checkpoint.spec.folds:
        raise UnsupportedError(
            f"a {checkpoint.spec.model_type} checkpoint cannot be written for other tools: tensors "
            "that they look for were folded into others when it was read"
        )
    _refuse_foreign(path)
    layers = Layers.of(checkpoint, chosen)
    tensors, dense = _tensors(layers, chosen)
    declared = chosen.declare(layers)
    with replace_directory(path) as folder:
        config = {**checkpoint.config, "quantization_config": declared}
        _write_json(folder / "config.json", config)
        if chosen.has_own_file:
            _write_json(folder / "quantize_config.json", declared)
        checkpoint.processor.save(folder)
        try:
            save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            # The library hides an operating system's error, such as a full disk, in its own.
            raise CheckpointError(f"{path}: cannot be written: {error}") from error
        weight_bytes = (folder / _WEIGHTS).stat().st_size
    return SavedLayout(
        layout=layout,
        quantized=tuple(layers.quantized),
        dense=dense,
        weight_bytes=weight_bytes,
        notes=(*_left_behind(checkpoint), *chosen.notes(layers, declared)),
    )


def _refuse_foreign(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file; --out is a folder that is made")
    if not any(path.iterdir()):
        return
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        ours = config["quantization_config"]["meta"]["quantizer"][0].startswith(f"{QUANTIZER}:")
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        ours = False
    if not ours:
        raise CheckpointError(
            f"{path}: holds something else; give a folder that does not exist, is empty, or that "
            "was written here before"
        )


def _tensors(layers: Layers, layout: Layout) -> tuple[dict[str, Tensor], dict[str, str]]:
    checkpoint = layers.checkpoint
    tensors: dict[str, Tensor] = {}
    dense: dict[str, str] = {}
    embedding = checkpoint.spec.decoder.embedding
    matrices: dict[str, FormEmbedding | FormLinear] = {
        embedding: checkpoint.layer(embedding),
        **layers.linears,
    }
    for name, module in matrices.items():
        if name in layers.quantized:
            own = layout.tensors(name, layers.quantized[name])
        else:
            own = {"weight": _narrowed(module.form.dequantize(), torch.bfloat16)}
            dense[name] = str(own["weight"].dtype).removeprefix("torch.")
        tensors |= {f"{name}.{key}": value.contiguous().clone() for key, value in own.items()}
    for name, parameter in checkpoint.model.named_parameters():
        is_bias = name.rpartition(".")[0] in layers.quantized
        first = layout.bias_type if is_bias else torch.bfloat16
        tensors[name] = _narrowed(parameter.detach(), first).contiguous()
    return {name: tensors[name] for name in sorted(tensors)}, dense


def _narrowed(values: Tensor, first: torch.dtype) -> Tensor:
    """The same float32 values in a type of 16 bits where one is exact, `first` preferred."""
    for dtype in (first, torch.bfloat16, torch.float16):
        narrow = values.to(dtype)
        if torch.equal(narrow.to(torch.float32), values):
            return narrow
    return values.clone()


def _left_behind(checkpoint: Checkpoint) -> list[str]:
    """What no layout has a place for."""
    notes = []
    if checkpoint.reducer is not None:
        notes.append("visual-token reduction is not stored: readers of the layout see every token")
    if checkpoint.spec.tower.merges:
        notes.append("the merge of tokens in the tower is not stored: readers run every patch")
    if checkpoint.cache_grid is not None:
        notes.append("the int8 grid of the KV cache is not stored: readers keep their own cache")
    if checkpoint.visual_schedule is not None:
        notes.append(
            "visual tokens run through all decoder layers there, not "
            f"{checkpoint.visual_schedule.describe()}"
        )
    embedding = checkpoint.spec.decoder.embedding
    if not isinstance(checkpoint.form(embedding), DenseWeight):
        notes.append(f"{embedding} is quantized here and dense there: the layout has no tables")
    return notes


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
