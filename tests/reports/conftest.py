"""Made-up blocks."""

from __future__ import annotations

import pytest

from tests.device_bench.rig import make_block


@pytest.fixture
def block():
    """Makes blocks."""
    return make_block
