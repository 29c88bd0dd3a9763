"""Weight files: which files of a directory hold its weights, by the rule of stock transformers.

A `model.safetensors` is read alone; without one, exactly the shards that
`model.safetensors.index.json` names. `transformers_weights` in config.json names one of the two
itself. Other files (shards of an earlier save, other variants, adapters, pickled copies) are not
read, and a note says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketvlm.errors import CheckpointError, name_some
from pocketvlm.files.reader import file_sha256, is_lfs_pointer, locate
from pocketvlm.json_io import read_json

__all__ = ["MappedFiles", "WeightFiles", "find_weight_files", "verify_blobs"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OTHER_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.json"),
    *("consolidated*", "adapter_model*", "adapter_config.json", "*.gguf", "*.h5", "*.msgpack"),
)


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files that hold a model's weights.

    Attributes:
        files: The files, sorted by name.
        placed: The file that an index names for each tensor, by the tensor's stored name; empty
            without an index.
        notes: Other weight files that are not read.
    """

    files: tuple[Path, ...]
    placed: Mapping[str, str]
    notes: tuple[str, ...]


def find_weight_files(path: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The files of a directory that hold its weights.

    Args:
        path: The directory.
        config: Content of its config.json.

    Raises:
        CheckpointError: There are none, one is missing, outside the directory or a git-lfs pointer,
            the index is damaged, or the weights are pickled.
    """
    named = config.get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".index.json")):
            raise CheckpointError(
                f"{path / 'config.json'}: transformers_weights must name a *.safetensors or "
                "*.safetensors.index.json file"
            )
        first = locate(path, named, error=CheckpointError)
    elif (path / _SINGLE).exists() or (path / _SINGLE).is_symlink():
        first = locate(path, _SINGLE, error=CheckpointError)
    elif (path / _INDEX).exists() or (path / _INDEX).is_symlink():
        first = locate(path, _INDEX, error=CheckpointError)
    else:
        raise CheckpointError(_why_none(path))
    placed = _read_index(first) if first.name.endswith(".index.json") else {}
    files = (
        tuple(locate(path, name, error=CheckpointError) for name in sorted(set(placed.values())))
        if placed
        else (first,)
    )
    for file in files:
        _refuse_pointer(file)
    used = {first, *files}
    ignored = sorted(
        file.relative_to(path).as_posix()
        for pattern in _OTHER_WEIGHTS
        for file in (*path.glob(pattern), *path.glob(f"*/{pattern}"))
        if file not in used
    )
    note = f"weight files that are not read, as stock transformers reads {first.name} alone"
    notes = (f"{note}: {name_some(dict.fromkeys(ignored))}",) if ignored else ()
    return WeightFiles(files=files, placed=placed, notes=notes)


@dataclass(frozen=True, kw_only=True)
class MappedFiles:
    """Weight files that a run has mapped, as they were when it began.

    A file that is replaced or removed meanwhile does no harm: its mapping keeps the old content.

    Attributes:
        states: Device, inode, size and time of change of each.
    """

    states: Mapping[Path, tuple[int, ...]]

    @classmethod
    def of(cls, files: Sequence[Path]) -> MappedFiles:
        """The files as they are now."""
        return cls(states={file: _state(file.stat()) for file in files})

    def hold_unchanged(self) -> None:
        """Makes sure that everything that was read so far is of one model.

        Raises:
            CheckpointError: A file was written to.
        """
        for file, before in self.states.items():
            now = _state(file.stat()) if file.exists() else ()
            if now[:2] == before[:2] and now != before:
                raise CheckpointError(
                    f"{file}: was written to while the run read it, so what was made of it mixes "
                    "two models; remove the run folder and start again"
                )


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def verify_blobs(files: Sequence[Path]) -> list[str]:
    """Digests of weight files, checked against their names in a hub cache.

    In a hub cache a link points to a file that is named by its digest. Other foreign files cannot
    be checked; those of saved checkpoints are signed by their manifest.

    Raises:
        CheckpointError: A file is not what its name says.
    """
    digests = []
    for file in files:
        found = file_sha256(file)
        target = file.resolve().name
        if file.is_symlink() and len(target) == len(found) and target != found:
            raise CheckpointError(
                f"{file}: is damaged: sha256 {found[:12]}…, expected {target[:12]}…"
            )
        digests.append(found)
    return digests


def _refuse_pointer(file: Path) -> None:
    try:
        is_pointer = is_lfs_pointer(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    if is_pointer:
        raise CheckpointError(
            f"{file}: is a pointer of git-lfs, not the file itself; run `git lfs pull` in its clone"
        )


def _read_index(index: Path) -> dict[str, str]:
    placed = read_json(index, error=CheckpointError).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index}: weight_map is missing; it says which file holds a tensor")
    for tensor, name in placed.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map places {tensor} in {name!r}, not a *.safetensors file"
            )
    return placed


def _why_none(path: Path) -> str:
    stray = sorted(file.name for file in path.glob("*.safetensors"))
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if stray:
        return (
            f"{path}: neither {_SINGLE} nor {_INDEX} is here, which stock transformers reads; "
            f"found {name_some(stray)}"
        )
    if pickled:
        return (
            f"{path / pickled[0]}: pickled weights can run code and are never loaded; save the "
            "model again with model.save_pretrained(..., safe_serialization=True)"
        )
    return f"{path}: no *.safetensors here"
