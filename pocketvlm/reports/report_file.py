"""Report files: read once, validated, and handed on as a `Report`.

A report is an untrusted file. Every value must have the type that `report` and `measurement`
declare, and an error is one line with its place. Unknown keys, of a later version perhaps, are
skipped; `null` means not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketvlm.errors import InputError
from pocketvlm.files.reader import locate
from pocketvlm.json_io import DecodeError, decode, read_json
from pocketvlm.machine import REPORT_SCHEMA
from pocketvlm.reports.report import Report

__all__ = ["parse_report", "read_report"]

_MAX_BYTES = 2**26
_MAX_DEPTH = 24
_LARGEST = 1e18
_SMALLEST = 1e-18

_MEASURED = ("size", "quality", "latency", "memory", "bench", "parity")


def read_report(path: Path) -> Report:
    """Reads a report.json, that of a run's folder, or what `pocketvlm bench` wrote.

    Args:
        path: The file, or a folder that holds `report.json`.

    Raises:
        InputError: It cannot be read or is not a report; the message has the place of the error.
    """
    file = locate(path, "report.json", error=InputError) if path.is_dir() else path
    document = read_json(file, error=InputError, max_bytes=_MAX_BYTES)
    try:
        _require_report(document)
        for block, value in document.items():
            # Losses of layers may be arbitrarily small: they are not drawn on an axis.
            _check_numbers(value, block, 1, 0.0 if block == "stages" else _SMALLEST)
        return parse_report(document)
    except DecodeError as fault:
        raise InputError(f"{file}: {fault}") from fault


def parse_report(document: Mapping[str, Any]) -> Report:
    """Converts JSON values to a report.

    Args:
        document: JSON values, as `read_json` returns them.

    Raises:
        DecodeError: A value does not have the declared type; the message has its place.
    """
    return decode(Report, document, tolerant=True)


def _require_report(document: Mapping[str, Any]) -> None:
    schema = document.get("schema", REPORT_SCHEMA)
    if type(schema) is not int or schema != REPORT_SCHEMA:
        raise DecodeError(f"schema: is {schema!r}; this version reads {REPORT_SCHEMA}")
    if not any(document.get(block) for block in _MEASURED):
        raise DecodeError(f"is not a report: it has none of {', '.join(_MEASURED)}")


def _check_numbers(value: Any, place: str, depth: int, smallest: float) -> None:
    """Refuses numbers that are not plausible as a time or a size, and could not be drawn."""
    if depth > _MAX_DEPTH:
        raise DecodeError(f"{place[:60]}…: is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check_numbers(item, f"{place}.{key}", depth + 1, smallest)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        size = abs(value)  # an `int` may be larger than any `float`: compared, never converted
        if not (size == 0 or smallest <= size <= _LARGEST):  # false for NaN as well
            raise DecodeError(
                f"{place}: is a number out of range; allowed are 0 and sizes from {smallest:g} to "
                f"{_LARGEST:g}"
            )
