"""Foreign code: a model folder may ask libraries to fetch and run code; here nothing runs it.

Hugging Face's configuration files can name Python modules of the folder, or of another repository
(`owner/repo--module.Class`), and kernels that are fetched from a hub. The library asks at the
terminal and runs them after one "y". So every configuration file is searched before a library sees
the folder, and whatever selects kernels is removed from what the library gets.

`STOCK_ONLY` goes to every call that loads from a folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pocketvlm.errors import CheckpointError
from pocketvlm.files.reader import is_lfs_pointer, locate, read_text
from pocketvlm.json_io import parse_json

__all__ = ["ATTENTION", "CODE_KEYS", "STOCK_ONLY", "plain_config", "refuse_foreign_code"]

STOCK_ONLY: Mapping[str, bool] = MappingProxyType(
    {"trust_remote_code": False, "local_files_only": True}
)
"""Arguments of every `from_pretrained`: only the library's own code, no hub access."""

ATTENTION = "sdpa"
"""The attention implementation of stock models: torch's own, also the library's default."""

CODE_KEYS = ("auto_map", "custom_pipelines")
"""Keys that name code, at any depth."""

_REMOTE_CLASS = re.compile(r"[\w.-]+(?:/[\w.-]+)?--[\w.-]+\.\w+")
_KERNEL_KEYS = frozenset(
    f"{lead}{subject}_implementation{ending}"
    for lead in ("", "_")
    for subject in ("attn", "experts")
    for ending in ("", "_internal")
) | {"use_kernels", "kernel_config"}
_READ_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt"})
_READ_FOLDERS = ("additional_chat_templates",)
# Keys in these are words of a text, or names of tensors.
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json"})
_SHOWN = 60


def refuse_foreign_code(folder: Path, advice: str | None = None) -> None:
    """Searches every file of a model folder that a library may read.

    Args:
        folder: The folder.
        advice: What to do with a model that needs code; `None` where nothing better is known than
            to convert it.

    Raises:
        CheckpointError: One asks for code, leads out of the folder, is not a regular file, or is a
            git-lfs pointer; the message names file and key.
    """
    for place in (folder, *(folder / name for name in _READ_FOLDERS)):
        if not place.is_dir():
            continue
        for entry in sorted(place.iterdir()):
            if entry.suffix not in _READ_SUFFIXES:
                continue
            file = locate(folder, entry.relative_to(folder).as_posix(), error=CheckpointError)
            if is_lfs_pointer(file):
                raise CheckpointError(
                    f"{file}: is a pointer of git-lfs, not the file itself; run `git lfs pull` in "
                    "its clone"
                )
            if file.suffix == ".json" and not _is_vocabulary(file.name):
                _refuse_code(
                    file, advice or "convert the model to stock transformers classes first"
                )


def plain_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A configuration without keys that choose kernels, and a note for each one that is ignored.

    Raises:
        CheckpointError: It is nested too deeply.
    """
    notes: list[str] = []

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, list):
            return [plain(item, path) for item in value]
        if not isinstance(value, Mapping):
            return value
        kept = {}
        for key, item in value.items():
            place = f"{path}.{key}" if path else str(key)
            if key not in _KERNEL_KEYS:
                kept[key] = plain(item, place)
            elif item not in (None, False, ATTENTION):
                notes.append(
                    f"config.json: {place} asks for {_shown(item)}, which is ignored: the model "
                    f"is built with {ATTENTION}, and no kernels are fetched"
                )
        return kept

    try:
        return plain(config, ""), tuple(notes)
    except RecursionError as error:
        raise CheckpointError("config.json: is nested too deeply") from error


def _is_vocabulary(name: str) -> bool:
    return name in _VOCABULARIES or name.endswith(".index.json")


def _refuse_code(file: Path, advice: str) -> None:
    text = read_text(file, error=CheckpointError)
    try:
        document = parse_json(text, str(file), error=CheckpointError)
    except CheckpointError:
        return  # no library can read it either; the reader of that file reports what is wrong
    for path, key, value in _entries(document):
        if (key in CODE_KEYS and value) or (
            isinstance(value, str) and _REMOTE_CLASS.fullmatch(value)
        ):
            raise CheckpointError(
                f"{file}: needs its own code ({path}: {_shown(value)}), which is never run; "
                f"{advice}"
            )


def _entries(document: Any) -> Iterator[tuple[str, str, Any]]:
    """Every value of a document with its path and key, without recursion."""
    waiting: list[tuple[str, str, Any]] = [("", "", document)]
    while waiting:
        path, key, value = waiting.pop()
        yield path, key, value
        if isinstance(value, dict):
            waiting += [(f"{path}.{k}" if path else k, k, item) for k, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}.{index}", key, item) for index, item in enumerate(value)]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
