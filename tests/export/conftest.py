"""Fixtures of the exporters' tests."""

from __future__ import annotations

import pytest

from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx


@pytest.fixture
def exact() -> ToOnnx:
    """The target without rounding of activations, for tight comparisons."""
    return ToOnnx(accuracy_level=0, tower_accuracy_level=0)


@pytest.fixture
def ctx() -> RunContext:
    return RunContext()
