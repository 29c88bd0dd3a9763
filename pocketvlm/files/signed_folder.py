"""A signed folder: its document lists the digest of every file that may be read from it.

A bundle (manifest.json) and a saved checkpoint (pocketvlm.json) are signed folders. Unlisted files
are refused as well as changed ones: a reader that looks for an optional file would take them. The
document has its own digest, so that no bit of it changes unnoticed either.

A digest proves that nothing changed since the document was written. It does not prove who wrote it:
`docs/security.md` says how to sign the document with a key.
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
"""The key of a document's own digest, which covers everything else in it."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN = 12


def sign_files(folder: Path, unsigned: Iterable[str]) -> dict[str, str]:
    """Digests of every file in a folder, by relative name, sorted."""
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
        document: Name of the document. It is not listed itself, nor are files named after it, such
            as a detached signature.
        unsigned: Other files that need not be listed, because no reader uses them.
        error: What is raised.

    Raises:
        PocketVLMError: `error`: nothing is listed, or a file is missing, not a regular file,
            outside the folder, changed, or not listed.
    """
    if not files:
        raise error(f"{folder / document}: lists no files; every file that is used must be listed")
    for name, expected in files.items():
        if not _DIGEST.fullmatch(expected):
            raise error(f"{folder / document}: the digest of {name!r} is not a sha256")
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
    """The document with its own digest."""
    content = {key: value for key, value in document.items() if key != DIGEST_KEY}
    return {**content, DIGEST_KEY: _digest(content)}


def verify_document(
    document: Mapping[str, Any], path: Path, *, error: type[PocketVLMError]
) -> None:
    """Compares a document with its own digest, if it has one.

    Raises:
        PocketVLMError: `error`: it was changed.
    """
    content = {key: value for key, value in document.items() if key != DIGEST_KEY}
    try:
        is_intact = DIGEST_KEY not in document or document[DIGEST_KEY] == _digest(content)
    except RecursionError as fault:
        raise error(f"{path}: is nested too deeply") from fault
    if not is_intact:
        raise error(f"{path}: was changed after it was written: its own digest does not match")


def _digest(content: Mapping[str, Any]) -> str:
    # As it is read back: a tuple becomes a list, and the order of keys does not count.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _entries(folder: Path, error: type[PocketVLMError]) -> Iterator[str]:
    """Every file in a folder, and every empty folder."""

    def refuse(fault: OSError) -> None:
        raise error(f"{fault.filename}: cannot be read: {fault.strerror}") from fault

    for parent, folders, files in os.walk(folder, onerror=refuse):
        here = Path(parent).relative_to(folder)
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        if not folders and not files and here != Path():
            yield here.as_posix()
        for name in sorted((*files, *links)):
            yield (here / name).as_posix()
