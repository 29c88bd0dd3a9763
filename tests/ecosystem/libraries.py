"""Libraries of others that tests of this folder ask; `make test-ecosystem` installs them."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import pytest


def needed(module: str) -> ModuleType:
    """The module; where it is missing, the test is skipped, and fails in `make test-ecosystem`."""
    if os.environ.get("POCKETVLM_ECOSYSTEM"):
        return import_module(module)
    return pytest.importorskip(module, reason=f"{module.partition('.')[0]} is not installed")
