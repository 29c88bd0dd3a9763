"""Work in progress on disk: an interrupted run resumes from it, and what was damaged is made again.

Every file holds the digest of its content. One that is torn, was changed by a failing disk or
holds another layer's tensors counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pocketvlm.errors import BundleError
from pocketvlm.files.publish import replace_file
from pocketvlm.files.signed_folder import DIGEST_KEY, sign_document, verify_document
from pocketvlm.json_io import read_json, write_json

__all__ = ["find_document", "find_tensors", "keep_document", "keep_tensors"]

_DOCUMENT = "document"


def keep_document(path: Path, document: Mapping[str, Any]) -> None:
    """Writes JSON values with their digest.

    Raises:
        StorageError: The disk is full.
    """
    write_json(path, sign_document(document))


def find_document(path: Path) -> dict[str, Any] | None:
    """What `keep_document` wrote; `None` where nothing is there, or it is damaged."""
    try:
        document = read_json(path)
        verify_document(document, path, error=BundleError)
    except BundleError:
        return None
    return document if document.pop(DIGEST_KEY, None) is not None else None


def keep_tensors(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Writes tensors and JSON values about them with their digest.

    Raises:
        StorageError: The disk is full.
    """
    text = json.dumps(document)
    metadata = {_DOCUMENT: text, DIGEST_KEY: _digest(path, tensors, text)}
    with replace_file(path) as aside:
        save_file(dict(tensors), aside, metadata=metadata)


def find_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `keep_tensors` wrote, mapped; `None` where nothing is there, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: _kept(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118  (no mapping)
            metadata = file.metadata()
        text = metadata[_DOCUMENT]
        if metadata[DIGEST_KEY] != _digest(path, tensors, text):
            return None
        return tensors, json.loads(text)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _kept(mapped: Tensor) -> Tensor:
    """A tensor as safetensors maps it; what is smaller than a page is copied out of its mapping."""
    return mapped.clone() if mapped.nbytes < mmap.PAGESIZE else mapped


def _digest(path: Path, tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(f"{path.name}\n{text}\n".encode())
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
