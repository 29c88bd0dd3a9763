"""Whether the runtime that is installed is one that the bundle was written for."""

from __future__ import annotations

import re

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError

__all__ = ["is_older", "require_runtime"]


def is_older(found: str, lowest: str) -> bool:
    """Whether a version comes before another; only the numbers that lead it count."""
    return _numbers(found) < _numbers(lowest)


def require_runtime(bundle: Bundle, target: str, found: str) -> None:
    """Refuses a runtime that is older than a target's files need.

    Args:
        bundle: An opened bundle; one that names no version is taken as it is.
        target: Which of its targets is about to be opened.
        found: The runtime's version.

    Raises:
        BundleError: The runtime is older.
    """
    needs = bundle.manifest.runtimes.get(target)
    if needs is not None and is_older(found, needs.lowest_version):
        raise BundleError(
            f"{bundle.path}: its {target} files need {needs.runtime} {needs.lowest_version} or "
            f"newer; {found} is installed"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """`1.27.0+cpu` is (1, 27); zeros at the end say nothing."""
    leading = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in leading[0].split(".")] if leading else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
