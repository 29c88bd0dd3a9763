"""Prints the part of the lock that the emulated ARM64 Python gets: what a bundle's runtime imports.

    python requirements/arm64_wheels.py > pocketvlm/emulation/arm64/wheels.txt

A test imports the runtime and holds the names to what it loads.
"""

from __future__ import annotations

import sys
from pathlib import Path

LOCK = Path(__file__).with_name("lock.txt")
PACKAGES = ("jinja2", "markupsafe", "numpy", "onnxruntime", "pillow", "tokenizers")


def locked(lock: str) -> str:
    """The lines of a lock, exact versions and digests, that belong to `PACKAGES`.

    Raises:
        ValueError: One of them is not locked.
    """
    kept: list[str] = []
    found: set[str] = set()
    takes = False
    for line in lock.splitlines():
        if not line.startswith((" ", "#")):
            name = line.partition("==")[0]
            takes = name in PACKAGES
            found |= {name} if takes else set()
        if takes and not line.lstrip().startswith("#"):
            kept.append(line)
    if found != set(PACKAGES):
        raise ValueError(f"not locked: {', '.join(sorted(set(PACKAGES) - found))}")
    return "\n".join(kept) + "\n"


if __name__ == "__main__":
    sys.stdout.write(locked(LOCK.read_text(encoding="utf-8")))
