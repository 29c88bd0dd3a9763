"""A signed folder: its document lists the digest of every file that may be read from it.

A bundle (manifest.json) and a saved checkpoint (pocketvlm.json) are signed folders. What is there
and not listed is refused as well as what was changed: a reader that looks for a file which the
writer did not need would take it. The document has a digest of itself, so that no bit of it changes
unseen either.

A digest proves that nothing changed since the document was written. It does not prove who wrote it:
`docs/security.md` tells how to sign the document with a key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pocketvlm.errors import PocketVLMError
from pocketvlm.files.reader import file_sha256, locate

__all__ = ["DIGEST_KEY", "sign_document", "sign_files", "verify_document", "verify_files"]

DIGEST_KEY = "sha256"
"""Where a document keeps the digest of everything else in it."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN = 12


def sign_files(folder: Path, unsigned: Iterable[str]) -> dict[str, str]:
    """Digests of every file below a folder, by its relative name, in sorted order."""
    left_out = frozenset(unsigned)
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))
    return {
        name: file_sha256(folder / name)
        for name in names
        if name not in left_out and (folder / name).is_file()
    }


def verify_files(
    folder: Path,
    files: Mapping[str, str],
    document: str,
    unsigned: Iterable[str],
    *,
    error: type[PocketVLMError],
) -> None:
    """Compares a folder with the digests of its files.

    Args:
        folder: The folder.
        files: What its document lists: digests by relative name.
        document: Name of the document. Itself, and files that are named after it, such as a
            detached signature, are not listed.
        unsigned: Other files that need not be listed, because no reader takes them.
        error: What is raised.

    Raises:
        PocketVLMError: `error`, where nothing is listed, a file is missing, no regular file, leads
            out of the folder, was changed, or is not listed.
    """
    if not files:
        raise error(f"{folder / document}: lists no files; every file that is used must be listed")
    for name, expected in files.items():
        if not _DIGEST.fullmatch(expected):
            raise error(f"{folder / document}: the digest of {name!r} is no sha256")
        path = locate(folder, name, error=error)
        found = file_sha256(path)
        if found != expected:
            raise error(
                f"{path}: was changed after signing: sha256 {found[:_SHOWN]}…, "
                f"{document} says {expected[:_SHOWN]}…"
            )
    known = {*files, document, *unsigned}
    for name in _entries(folder, error):
        is_beside_document = name.startswith(f"{document}.") and "/" not in name
        if name not in known and not is_beside_document:
            raise error(
                f"{folder / name}: is not listed in {document}; only files that are signed may "
                "lie here, so remove it"
            )


def sign_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the digest of itself."""
    content = {key: value for key, value in document.items() if key != DIGEST_KEY}
    return {**content, DIGEST_KEY: _digest(content)}


def verify_document(
    document: Mapping[str, Any], path: Path, *, error: type[PocketVLMError]
) -> None:
    """Compares a document with the digest of itself, where it has one.

    Raises:
        PocketVLMError: `error`, where it was changed.
    """
    content = {key: value for key, value in document.items() if key != DIGEST_KEY}
    try:
        is_intact = DIGEST_KEY not in document or document[DIGEST_KEY] == _digest(content)
    except RecursionError as fault:
        raise error(f"{path}: is nested too deeply") from fault
    if not is_intact:
        raise error(f"{path}: was changed after it was written: its own digest does not match")


def _digest(content: Mapping[str, Any]) -> str:
    # As it is read back: a tuple is a list, and the order of keys says nothing.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _entries(folder: Path, error: type[PocketVLMError]) -> Iterator[str]:
    """Everything below a folder that a name can stand for; of folders, those that are empty."""

    def refuse(fault: OSError) -> None:
        raise error(f"{fault.filename}: cannot be read: {fault.strerror}") from fault

    for parent, folders, files in os.walk(folder, onerror=refuse):
        here = Path(parent).relative_to(folder)
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        if not folders and not files and here != Path():
            yield here.as_posix()
        for name in sorted((*files, *links)):
            yield (here / name).as_posix()
