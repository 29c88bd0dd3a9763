"""The folder of a Core ML package, laid out as coremltools does, the same bytes each time."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from pocketvlm.errors import ExportError

__all__ = ["create_package", "read_back", "share_literals", "write_model"]

_MODEL = "com.apple.CoreML/model.mlmodel"
_WEIGHTS = "com.apple.CoreML/weights"
_AUTHOR = "com.apple.CoreML"
_NAMESPACE = uuid.UUID("6f1d6b0e-64a4-5f2c-9d0e-9a4f6d1c2b71")


def create_package(path: Path) -> Path:
    """An empty package in place of what was there; returns the folder of its weights."""
    shutil.rmtree(path, ignore_errors=True)
    weights = path / "Data" / _WEIGHTS
    weights.mkdir(parents=True)
    return weights


def write_model(path: Path, spec: Any) -> None:
    """Writes the model beside its weights, and the list of what the folder holds.

    Args:
        path: A package of `create_package`, whose weights are written.
        spec: The model as a message of the format; literals of its functions are shared.
    """
    for function in spec.mlProgram.functions.values():
        share_literals(function.block_specializations[function.opset])
    # Maps have no order.
    (path / "Data" / _MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    _write_manifest(path)


def share_literals(block: Any) -> None:
    """Keeps one of all small constants that are equal: axes, flags and shapes of every operator.

    The toolkit writes one for each parameter of each operator, a third of a decoder's graph.
    """
    kept: dict[bytes, str] = {}
    names: dict[str, str] = {}
    outputs = set(block.outputs)
    operations = []
    for operation in block.operations:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.name in names:
                    binding.name = names[binding.name]
        if operation.type == "const" and operation.outputs[0].name not in outputs:
            value = operation.attributes["val"]
            if value.HasField("immediateValue"):
                name = operation.outputs[0].name
                first = kept.setdefault(value.SerializeToString(deterministic=True), name)
                if first != name:
                    names[name] = first
                    continue
        operations.append(operation)
    del block.operations[:]
    block.operations.extend(operations)


def read_back(path: Path) -> None:
    """Loads a package: what cannot be loaded is not an export.

    Raises:
        ExportError: It is damaged or empty.
    """
    import coremltools

    try:
        spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{path.name}: was written and cannot be read: {reason}") from error
    if not spec.mlProgram.functions:
        raise ExportError(f"{path.name}: was written and holds no function")


def _write_manifest(path: Path) -> None:
    """The list of what is in the folder, as the toolkit writes it, without random identifiers."""
    items = {
        "model.mlmodel": (_MODEL, "CoreML Model Specification"),
        "weights": (_WEIGHTS, "CoreML Model Weights"),
    }
    identifiers = {name: str(uuid.uuid5(_NAMESPACE, name)) for name in items}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            identifiers[name]: {
                "author": _AUTHOR,
                "description": description,
                "name": name,
                "path": place,
            }
            for name, (place, description) in items.items()
        },
        "rootModelIdentifier": identifiers["model.mlmodel"],
    }
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")
