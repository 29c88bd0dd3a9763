"""Programs that tests run and Python does not bring: `requirements/debian.txt` lists them."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

__all__ = ["IS_CI", "give_up", "require_program"]

IS_CI = os.environ.get("CI", "").lower() in ("1", "true")
"""Whether this is a run that must skip nothing for want of a program."""


def give_up(reason: str) -> NoReturn:
    """Ends a test that lacks a program: a failure in CI, elsewhere a skip."""
    if IS_CI:
        pytest.fail(reason)
    pytest.skip(reason)


def require_program(*names: str) -> str:
    """The path of the first of these programs that is installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if found is None:
        give_up(f"{' or '.join(names)} is not installed")
    return found
