"""JSON in and out: untrusted documents are read within bounds, ours are written atomically.

An untrusted file can be anything: a pipe, not UTF-8, gigabytes long, nested a million times.
`read_json` returns a document or raises the caller's own error with one line. The document is then
`decode`d into frozen dataclasses, so that later code never meets a value of an unexpected type.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pocketvlm.errors import BundleError, PocketVLMError
from pocketvlm.files.publish import replace_file
from pocketvlm.files.reader import MAX_TEXT_BYTES, read_text
from pocketvlm.printable import STEERING

__all__ = ["DecodeError", "decode", "parse_json", "read_json", "write_json"]

_T = TypeVar("_T")
_SHOWN = 60
# JSON can spell a lone surrogate, which is not a character: encoding the text later would raise.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STEERING = re.compile(f"[{STEERING}]")


class DecodeError(ValueError):
    """A value is not what a dataclass declares; the message has its path and what is allowed."""


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
        raise error(f"{path}: holds a JSON {_kind(document)}, not an object")
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


def decode(kind: type[_T], value: Any, path: str = "") -> _T:
    """Builds a dataclass, or any type that its fields are annotated with, from JSON values.

    The annotation decides: `bool` is not a number, a whole number is accepted as a `float`, a list
    becomes a tuple, unknown keys and numbers that are not finite are refused. Annotations may be
    plain types, dataclasses, `Literal`, unions, `tuple[X, ...]`, `tuple[X, Y]`, `list[X]`,
    `Mapping[str, X]`, `dict[str, X]` and `Any`.

    Args:
        kind: The type.
        value: What `json.loads` returned.
        path: Where the value is in the document, for the message.

    Raises:
        DecodeError: The value does not fit, or the dataclass itself refuses it.
    """
    result: _T = _decode(kind, value, path)
    return result


def _decode(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_fields(kind, value, path)
    if origin is Literal:
        # `True == 1`, and a list has no hash: compare types as well.
        if not any(type(value) is type(known) and value == known for known in arguments):
            allowed = ", ".join(repr(known) for known in arguments)
            raise DecodeError(f"{_place(path)}is {_shown(value)}; allowed: {allowed}")
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, path)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise DecodeError(f"{_place(path)}must be a list, not {_shown(value)}")
        if origin is tuple and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise DecodeError(f"{_place(path)}must have {len(arguments)} items")
            kinds: Any = arguments
        else:
            kinds = [arguments[0]] * len(value)
        items = [
            _decode(k, v, _join(path, i)) for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        ]
        return tuple(items) if origin is tuple else items
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise DecodeError(f"{_place(path)}must be an object, not {_shown(value)}")
        return {key: _decode(arguments[1], item, _join(path, key)) for key, item in value.items()}
    return _decode_plain(kind, value, path)


def _decode_plain(kind: Any, value: Any, path: str) -> Any:
    if kind is None or kind is type(None):
        if value is not None:
            raise DecodeError(f"{_place(path)}must be null, not {_shown(value)}")
        return None
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise DecodeError(f"{_place(path)}must be a finite number")
        return number
    if kind not in (bool, int, str, float):
        raise TypeError(f"{kind!r} cannot be read from JSON")  # an error in the dataclass
    if type(value) is not kind:
        words = {bool: "true or false", int: "a whole number", str: "text", float: "a number"}
        raise DecodeError(f"{_place(path)}must be {words[kind]}, not {_shown(value)}")
    return value


def _decode_fields(kind: type[Any], value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise DecodeError(f"{_place(path)}must be an object, not {_shown(value)}")
    known = {item.name: item for item in fields(kind) if item.init}
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        where = _place(_join(path, unknown[0]))
        raise DecodeError(f"{where}unknown key; allowed: {', '.join(known)}")
    hints = get_type_hints(kind)
    content = {}
    for name, item in known.items():
        if name in value:
            content[name] = _decode(hints[name], value[name], _join(path, name))
        elif item.default is MISSING and item.default_factory is MISSING:
            raise DecodeError(f"{_place(_join(path, name))}is missing")
    try:
        return kind(**content)
    except DecodeError:
        raise
    except ValueError as fault:  # the dataclass checks its own ranges
        raise DecodeError(f"{_place(path)}{fault}") from fault


def _decode_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    problems: list[DecodeError] = []
    for kind in kinds:
        try:
            return _decode(kind, value, path)
        except DecodeError as fault:
            problems.append(fault)
    # The error deepest in the value is about the alternative that was intended.
    raise max(problems, key=lambda fault: str(fault).partition(":")[0].count("."))


def _join(path: str, step: object) -> str:
    return f"{path}.{step}" if path else str(step)


def _place(path: str) -> str:
    return f"{path}: " if path else ""


def _shown(value: Any) -> str:
    text = (
        json.dumps(value, ensure_ascii=True, default=repr)
        if not isinstance(value, dict | list)
        else f"a JSON {_kind(value)}"
    )
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
