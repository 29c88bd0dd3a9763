"""JSON files: untrusted ones are read within bounds, ours are written atomically.

An untrusted file can be anything: a pipe, not UTF-8, gigabytes long, nested a million times.
`read_json` returns a document or raises the caller's own error with one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketvlm.errors import BundleError, PocketVLMError
from pocketvlm.files.publish import replace_file
from pocketvlm.files.reader import MAX_TEXT_BYTES, read_text
from pocketvlm.json_io.values import json_kind
from pocketvlm.printable import STEERING

__all__ = ["parse_json", "read_json", "write_json"]

# JSON can spell a lone surrogate, which is not a character: encoding the text later would raise.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STEERING = re.compile(f"[{STEERING}]")


def read_json(
    path: Path,
    *,
    error: type[PocketVLMError] = BundleError,
    max_bytes: int = MAX_TEXT_BYTES,
) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: The file.
        error: What is raised when it cannot be read.
        max_bytes: The largest file that is read.

    Raises:
        PocketVLMError: `error`, with one line: the file is missing, not a regular file, too large,
            not UTF-8 or not a JSON object.
    """
    document = parse_json(read_text(path, error=error, max_bytes=max_bytes), str(path), error=error)
    if not isinstance(document, dict):
        raise error(f"{path}: holds a JSON {json_kind(document)}, not an object")
    return document


def parse_json(text: str | bytes, where: str, *, error: type[Exception] = BundleError) -> Any:
    """Parses JSON text.

    Args:
        text: The text, or its UTF-8 bytes.
        where: Where it comes from, for the message.
        error: What is raised when it is not JSON.

    Raises:
        PocketVLMError: `error`, with one line.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        document = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeDecodeError as fault:
        raise error(
            f"{where}: cannot be read as JSON: it is not UTF-8: byte {fault.start}"
        ) from fault
    except UnicodeEncodeError as fault:
        raise error(
            f"{where}: cannot be read as JSON: a text holds half of a surrogate pair"
        ) from fault
    except json.JSONDecodeError as fault:
        place = f"line {fault.lineno}, column {fault.colno}"
        raise error(f"{where}: cannot be read as JSON: {fault.msg} ({place})") from fault
    except RecursionError as fault:
        raise error(f"{where}: cannot be read as JSON: it is nested too deeply") from fault
    except ValueError as fault:  # a number with more digits than Python converts
        raise error(f"{where}: cannot be read as JSON: {fault}") from fault
    return document


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a document to a temporary file and renames it into place; same content, same bytes."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    # They can occur only inside a string, where JSON has an escape for each.
    text = _STEERING.sub(_json_escape, text) + "\n"
    with replace_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _json_escape(found: re.Match[str]) -> str:
    units = found.group().encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))
