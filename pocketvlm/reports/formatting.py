"""Values as text: three significant digits, a unit, and words for what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.reports.report import Facts

__all__ = [
    "NOT_MEASURED",
    "facts_of",
    "format_bytes",
    "format_figure",
    "format_measured",
    "format_number",
    "format_share",
    "number_of",
    "text_of",
    "unit_of",
]

NOT_MEASURED = "not measured"

_MANY = 1000
_LONG = 1000  # characters of a block that a page shows in full
_UNITS = {"_ms": "ms", "_tok_s": "tokens/s", "_bytes": "bytes", "_s": "s"}


def text_of(value: Any) -> str:
    """Any JSON value as short text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, Mapping):
        said = {key: item for key, item in value.items() if item is not None}
        return ", ".join(f"{key} {text_of(item)}" for key, item in said.items()) or "–"
    if isinstance(value, list | tuple):
        return "; ".join(text_of(item) for item in value) or "–"
    return str(value)


def format_number(value: float | None) -> str:
    """Three significant digits, or six if three show a whole number that it is not."""
    if value is None:
        return NOT_MEASURED
    if abs(value) >= _MANY:
        return f"{value:,.0f}"
    if value and abs(value) < 0.001:  # noqa: PLR2004  (below it, zeros outnumber digits)
        return f"{value:.2e}"
    text = f"{value:.3g}"
    if float(text) == round(value) != value:
        # 0.99994 is not 1: three digits would hide that a bound was missed.
        text = f"{value:.6g}"
    return f"{float(text):g}" if "e" in text else text


def format_measured(value: float | None) -> str:
    """Three significant digits, as precise as a timing is."""
    if not value or abs(value) >= _MANY or abs(value) < 0.001:  # noqa: PLR2004
        return format_number(value)
    return _three_digits(value)


def _three_digits(value: float) -> str:
    """Three significant digits, zeros at the end among them: columns of figures stay aligned."""
    text = f"{value:#.3g}".removesuffix(".")
    return f"{float(text):g}" if "e" in text else text


def format_bytes(value: float | None) -> str:
    """Decimal units, as app stores count."""
    if value is None:
        return NOT_MEASURED
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{float(f'{value / scale:.3g}'):g} {unit}"
    return f"{value:.0f} bytes"


def format_share(value: float | None, digits: int = 1) -> str:
    """Per cent."""
    return NOT_MEASURED if value is None else f"{value * 100:.{digits}f} %"


def unit_of(name: str) -> str:
    """The unit that a field's name ends with."""
    return next((unit for end, unit in _UNITS.items() if name.endswith(end)), "")


def format_figure(name: str, value: float | None) -> str:
    """A figure with the unit of its name."""
    if value is None:
        return NOT_MEASURED
    if name.endswith("_bytes"):
        return format_bytes(value)
    return f"{format_measured(value)} {unit_of(name)}".strip()


def facts_of(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Facts as (name, text) pairs, units moved from the names to the values."""
    return tuple(_fact(name, value) for name, value in facts.items())


def number_of(fact: Any) -> float | None:
    """The fact if it is a number."""
    return fact if isinstance(fact, int | float) and not isinstance(fact, bool) else None


def _fact(name: str, value: Any) -> tuple[str, str]:
    number = number_of(value)
    if number is not None and name.endswith("_bytes_s"):
        name, text = name.removesuffix("_bytes_s"), f"{format_bytes(number)}/s"
    elif number is not None and name.endswith("_bytes"):
        name, text = name.removesuffix("_bytes"), format_bytes(number)
    else:
        text = _short_text_of(value)
    return name.replace("_", " "), text


def _short_text_of(item: Any) -> str:
    """The value as text; large parts of a block are only counted, report.json has them."""
    if not isinstance(item, Mapping) or len(text_of(item)) <= _LONG:
        return text_of(item)
    return ", ".join(
        f"{len(part)} {key}, see report.json"
        if isinstance(part, Mapping | list) and len(text_of(part)) > _LONG
        else f"{key} {text_of(part)}"
        for key, part in item.items()
    )
