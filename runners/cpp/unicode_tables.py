"""Writes src/unicode_tables.inc: classes of characters that tokenizers ask for.

Usage: python runners/cpp/unicode_tables.py > runners/cpp/src/unicode_tables.inc
"""
# ruff: noqa: INP001  (a script beside C++ sources)

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator

_SECONDS = {
    ord(second)
    for code in range(sys.maxunicode + 1)
    if len(parts := unicodedata.decomposition(chr(code)).split()) == 2  # noqa: PLR2004
    and not parts[0].startswith("<")
    and unicodedata.normalize("NFC", chr(code)) == chr(code)
    for second in [chr(int(parts[1], 16))]
} | {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}  # second parts of Hangul syllables


def _is_changed(code: int) -> bool:
    """Whether normal form C may change a text that has this character."""
    return code in _SECONDS or unicodedata.normalize("NFC", chr(code)) != chr(code)


def _ranges(value_of: Callable[[int], int]) -> Iterator[tuple[int, int, int]]:
    """First and last character of every range of one value other than 0, and the value."""
    first, current = 0, 0
    for code in range(sys.maxunicode + 2):
        is_character = code <= sys.maxunicode and not 0xD800 <= code <= 0xDFFF  # noqa: PLR2004
        value = value_of(code) if is_character else 0
        if value != current:
            if current:
                yield first, code - 1, current
            first, current = code, value


def _write(name: str, value_of: Callable[[int], int]) -> None:
    rows = [f"{{0x{a:X}, 0x{b:X}, {value}}}" for a, b, value in _ranges(value_of)]
    lines = [""]
    for row in rows:
        if len(lines[-1]) + len(row) > 96:  # noqa: PLR2004
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{row},"
    sys.stdout.write(f"constexpr Range {name}[] = {{\n")
    sys.stdout.writelines(f"    {line}\n" for line in lines)
    sys.stdout.write("};\n")


sys.stdout.write(
    f"// Written by unicode_tables.py from Unicode {unicodedata.unidata_version}: do not edit.\n"
)
_write("kLetters", lambda code: int(unicodedata.category(chr(code)).startswith("L")))
_write("kNumbers", lambda code: int(unicodedata.category(chr(code)).startswith("N")))
_write("kCombining", lambda code: unicodedata.combining(chr(code)))
_write("kChangedByC", lambda code: int(_is_changed(code)))
