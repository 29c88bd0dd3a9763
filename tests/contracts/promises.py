"""What every entry of the tables of stages and targets promises as a piece of configuration."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from pocketvlm.errors import RecipeError
from pocketvlm.recipes.load import Recipe, recipe_from_document


def read(section: str, method: str, options: dict[str, Any]) -> Any:
    """One entry, as a recipe would give it."""
    document = {"schema": 1, "name": "contract", section: [{"method": method, **options}]}
    (entry,) = getattr(recipe_from_document(document, where="contract"), section)
    return entry


def require_configuration(section: str, entry: Any) -> None:
    """Frozen, the same after a round trip through JSON, and strict about keys."""
    for item in fields(entry):
        with pytest.raises(FrozenInstanceError):
            setattr(entry, item.name, None)
    recipe = Recipe(name="contract", **{section: (entry,)})
    document = json.loads(json.dumps(recipe.to_document()))
    again = recipe_from_document(document, where="contract")
    assert again == recipe
    assert again.sha256() == recipe.sha256()
    document[section][0]["beauty"] = 1
    with pytest.raises(RecipeError, match=rf"{section}\.0\.beauty: unknown key"):
        recipe_from_document(document, where="contract")
