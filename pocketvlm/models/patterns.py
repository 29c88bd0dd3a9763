"""Patterns: regular expressions of recipes and of other tools' files, within bounded time.

An expression such as `(a+)+b` can take years to say no. Python's own engine cannot be stopped;
this one is given a moment.
"""

from __future__ import annotations

from functools import lru_cache

import regex

from pocketvlm.errors import RecipeError

__all__ = ["compile_pattern", "pattern_matches"]

_LONGEST = 2**20
"""A rule that a solver writes names hundreds of layers one by one."""
_SECONDS = 0.1


@lru_cache(maxsize=256)
def compile_pattern(text: str) -> regex.Pattern[str]:
    """Compiles a regular expression.

    Raises:
        ValueError: It is none, or it is too long or nested too deeply.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"has {len(text)} characters; allowed are {_LONGEST}")
    try:
        return regex.compile(text)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"is not a regular expression: {error}") from error


def pattern_matches(pattern: str, name: str, *, whole: bool = True) -> bool:
    """Whether a layer's name matches a pattern.

    Args:
        pattern: The regular expression.
        name: The name.
        whole: Whether the whole name must match, or its beginning is enough.

    Raises:
        RecipeError: To say so would take too long.
    """
    compiled = compile_pattern(pattern)
    match = compiled.fullmatch if whole else compiled.match
    try:
        return match(name, timeout=_SECONDS) is not None
    except (TimeoutError, RecursionError, MemoryError) as error:
        raise RecipeError(
            f"match {pattern!r}: takes too long to compare with {name!r}; write it without "
            "repetitions inside repetitions"
        ) from error
