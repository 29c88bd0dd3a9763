"""docs/families.md says what the tests of this run find."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.families_page import render_page
from tests.contracts.targets import TARGETS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.mark.skipif(
    any(target.missing_toolkit for target in TARGETS.values()), reason="a toolkit is not installed"
)
def test_the_page_says_what_is_found():
    assert PAGE.read_text(encoding="utf-8") == render_page(), (
        "write it again: python -m tests.contracts.families_page > docs/families.md"
    )
