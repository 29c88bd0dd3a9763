"""Weight files: which files of a directory hold the weights, and their tensors by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pocketvlm.errors import CheckpointError
from pocketvlm.files import file_sha256
from pocketvlm.modelspec import ModelSpec, canonical_weight_name

__all__ = ["find_weight_files", "index_tensors", "read_tensor", "verify_files"]


def find_weight_files(path: Path) -> list[Path]:
    """The files of a directory that hold its weights.

    Raises:
        CheckpointError: There are none, one is missing, or they are pickled.
    """
    files = sorted(path.glob("*.safetensors"))
    if files:
        index = path / "model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(name for name in names if not (path / name).is_file())
            if missing:
                raise CheckpointError(f"{path}: {missing[0]} is in the index, but missing")
        return files
    pickled = sorted((*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")))
    if pickled:
        raise CheckpointError(
            f"{pickled[0]}: pickled weights can run code and are never loaded; save the model "
            "again with model.save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{path}: no *.safetensors here")


def verify_files(files: Iterable[Path], manifest: Mapping[str, Any] | None) -> list[str]:
    """Digests of weight files, compared with what is known of them.

    A manifest of ours knows the digest; in a hub cache the name of the file behind the link is
    the digest. A foreign file without either cannot be told from a changed one.
    """
    digests = []
    for file in files:
        found = file_sha256(file)
        known = manifest["files"].get(file.name) if manifest else None
        target = file.resolve().name
        if known is None and file.is_symlink() and len(target) == len(found):
            known = target
        if known is not None and known != found:
            raise CheckpointError(
                f"{file}: is damaged: sha256 {found[:12]}…, expected {known[:12]}…"
            )
        digests.append(found)
    return digests


def index_tensors(files: Sequence[Path], spec: ModelSpec) -> dict[str, tuple[Path, str]]:
    """Where each tensor of the model stands: its file and its name there.

    Raises:
        CheckpointError: A file is truncated or damaged.
    """
    index: dict[str, tuple[Path, str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                keys = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: is truncated or damaged: {error}") from error
        for key in keys:
            name = canonical_weight_name(spec.family, key)
            if name is not None:
                index[name] = (file, key)
    return index


def read_tensor(file: Path, key: str) -> Tensor:
    """One tensor of a weight file.

    Raises:
        CheckpointError: It cannot be read, or holds values that are not finite.
    """
    # Opened anew for each tensor: a mapping that lives on would keep every page it touched.
    try:
        with safe_open(file, framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(key).clone()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: tensor {key} cannot be read: {error}") from error
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{file}: tensor {key} holds values that are not finite")
    return value
