"""What a recipe may say of how many visual tokens are kept."""

from __future__ import annotations

__all__ = ["require_keep"]


def require_keep(name: str, keep: float) -> None:
    """Checks a share or a number of tokens.

    Raises:
        ValueError: It is neither.
    """
    is_count = isinstance(keep, int) and not isinstance(keep, bool)
    if is_count and keep < 1:
        raise ValueError(f"{name} is {keep}; a count is at least 1")
    if not is_count and not (isinstance(keep, float) and 0 < keep <= 1):
        raise ValueError(
            f"{name} is {keep!r}; allowed are a share in (0, 1] or a whole number of tokens"
        )
