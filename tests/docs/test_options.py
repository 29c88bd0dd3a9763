"""docs/options.md tells every option of every stage and target, as the dataclasses have it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from pocketvlm.recipes.options import option_meanings, render_options
from pocketvlm.recipes.stages import STAGES, TARGETS

PAGE = Path(__file__).parents[2] / "docs" / "options.md"


def test_the_page_is_what_the_dataclasses_say():
    assert PAGE.read_text(encoding="utf-8") == render_options(), (
        "write it again: python -m pocketvlm.recipes.options > docs/options.md"
    )


@pytest.mark.parametrize("kind", [*STAGES, *TARGETS], ids=lambda kind: kind.method)
def test_every_option_has_a_meaning(kind):
    meanings = option_meanings(kind)
    assert not [
        item.name for item in fields(kind) if item.name != "method" and not meanings.get(item.name)
    ]
