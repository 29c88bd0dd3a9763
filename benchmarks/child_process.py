"""Measurements in a separate process, so that its memory is counted alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

__all__ = ["resident_bytes", "run_child"]


def resident_bytes() -> int:
    """What this process holds in memory now."""
    return int(psutil.Process().memory_info().rss)


def run_child(script: str, model: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs a benchmark as its own child, and reads the JSON document on its last line."""
    command = [sys.executable, script, "--child", "--model", str(model), *arguments]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return row
