"""Report files: read once, held to the shapes that renderings and comparisons expect.

A report is a file that anybody may have written or changed. What a block is, an object, a list or a
figure, is checked here with its path; what a block holds beside that is shown as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketvlm.errors import InputError
from pocketvlm.files.reader import locate
from pocketvlm.json_io import read_json
from pocketvlm.machine import REPORT_SCHEMA

__all__ = ["read_report"]

_MAX_BYTES = 2**26
_MAX_DEPTH = 24
_LARGEST = 1e18
_SMALLEST = 1e-18

_OBJECTS = (
    *("model", "recipe", "calibration", "environment", "size", "quality", "parity", "latency"),
    *("memory", "bench", "workload", "bundles", "baseline", "ratios", "stability"),
)
_LISTS = ("stages", "plausibility", "order", "notes", "failures")
_BY_TARGET = ("latency", "baseline")
_MEASURED = ("size", "quality", "latency", "memory", "bench", "parity")


def read_report(path: Path) -> dict[str, Any]:
    """Reads a report.json, that of a run's folder, or what `pocketvlm bench --json` printed.

    Args:
        path: The file, or a folder that holds `report.json`.

    Raises:
        InputError: It cannot be read or is no report; the message has the place of what is wrong.
    """
    file = locate(path, "report.json", error=InputError) if path.is_dir() else path
    document = read_json(file, error=InputError, max_bytes=_MAX_BYTES)
    schema = document.get("schema", REPORT_SCHEMA)
    if type(schema) is not int or schema != REPORT_SCHEMA:
        raise InputError(f"{file}: schema: is {schema!r}; this version reads {REPORT_SCHEMA}")
    if not any(document.get(block) for block in _MEASURED):
        raise InputError(f"{file}: is no report: it has none of {', '.join(_MEASURED)}")
    _check_values(document, "", 0, file)
    _check_blocks(document, "", file)
    _check_blocks(document.get("bench") or {}, "bench.", file)
    return document


def _check_blocks(document: Mapping[str, Any], prefix: str, file: Path) -> None:
    for name in _OBJECTS:
        _require(document.get(name), dict, f"{prefix}{name}", file)
    for name in _LISTS:
        _require(document.get(name), list, f"{prefix}{name}", file)
    for name in _BY_TARGET:
        for target, figures in (document.get(name) or {}).items():
            _require(figures, dict, f"{prefix}{name}.{target}", file)
            for figure, value in (figures or {}).items():
                where = f"{prefix}{name}.{target}.{figure}"
                if figure != "failed":
                    _require(value, dict, where, file)
                    _require((value or {}).get("samples"), list, f"{where}.samples", file)
    for role, arm in (document.get("bundles") or {}).items():
        _require(arm, dict, f"{prefix}bundles.{role}", file)


def _require(value: Any, kind: type, place: str, file: Path) -> None:
    if value is not None and not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise InputError(f"{file}: {place}: must be {wanted}, not {_kind(value)}")


def _check_values(value: Any, place: str, depth: int, file: Path) -> None:
    """Numbers that no clock or disk ever gave would make figures that cannot be drawn."""
    if depth > _MAX_DEPTH:
        raise InputError(f"{file}: {place[:60]}…: is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_values(item, f"{place}.{key}" if place else str(key), depth + 1, file)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        size = abs(value)  # an `int` may be larger than any `float`: compared, never converted
        if not (size == 0 or _SMALLEST <= size <= _LARGEST):  # false for NaN as well
            raise InputError(f"{file}: {place}: is a number out of range")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean"}
    return names.get(type(value), "a number")
