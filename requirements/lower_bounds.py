"""Prints the lowest versions that pyproject.toml allows, as constraints for pip.

    python requirements/lower_bounds.py > lower_bounds.txt

Every requirement of the package and of its extras must name its lower bound: what is not tested
at a version is not promised there.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lower_bound(text: str) -> str:
    """The constraint that pins a requirement to its lowest version.

    Raises:
        ValueError: It has no lower bound, or several.
    """
    requirement = Requirement(text)
    found = [bound.version for bound in requirement.specifier if bound.operator in (">=", "==")]
    if len(found) != 1:
        raise ValueError(f"{PROJECT.name}: {text!r} names {len(found)} lower bounds; one is needed")
    return f"{requirement.name}=={found[0]}"


def main() -> None:
    """Prints one constraint a line."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    for text in (*project["dependencies"], *(text for extra in extras for text in extra)):
        sys.stdout.write(lower_bound(text) + "\n")


if __name__ == "__main__":
    main()
