"""Stages that take gradients of the whole model stand before those that leave it fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest

from pocketvlm.errors import RecipeError
from pocketvlm.recipes.load import recipe_from_document

FEWER = {
    "merge_tokens": {"method": "merge_tokens"},
    "drop_tokens": {"method": "drop_tokens"},
    "reduce_tokens": {"method": "reduce_tokens"},
}
RULES = [{"match": ".*", "bits": 4, "group_size": 32}]


def pruned(**options: Any) -> dict[str, Any]:
    return {"method": "prune", "score": {"kind": "wanda"}, **options}


def narrowed(importance: str) -> dict[str, Any]:
    return {"method": "prune_width", "ffn_ratio": 0.5, "importance": {"kind": importance}}


def rounded(order: str) -> dict[str, Any]:
    options: dict[str, Any] = {"rules": RULES, "prune_rules": [{"part": "decoder"}]}
    return {
        "method": "sparsegpt_gptq",
        "allocation": {"kind": "ecoflap", "order": order},
        **options,
    }


# Each as it takes gradients, and as it takes none.
STAGES = {
    "gblm": (pruned(score={"kind": "gblm"}), pruned(score={"kind": "gblm", "alpha": 0})),
    "gblm, of blocks": (pruned(score={"kind": "gblm", "gradient": "block"}), pruned()),
    "ecoflap": tuple(
        pruned(allocation={"kind": "ecoflap", "order": order}) for order in ("first", "zeroth")
    ),
    "taylor": (narrowed("taylor"), narrowed("flap")),
    "sparsegpt_gptq": (rounded("first"), rounded("zeroth")),
}


def read(*stages: dict[str, Any]) -> None:
    recipe_from_document({"schema": 1, "name": "x", "stages": list(stages)}, where="x")


@pytest.mark.parametrize("name", STAGES)
def test_gradients_come_before_tokens_are_merged(name: str) -> None:
    gradients, none = STAGES[name]
    with pytest.raises(RecipeError, match=r"stages\.1 .*all its tokens.* leaves merged_tokens"):
        read(FEWER["merge_tokens"], gradients)
    read(FEWER["merge_tokens"], none)
    if name != "sparsegpt_gptq":  # nothing merges tokens of a model that is quantized
        read(gradients, FEWER["merge_tokens"])


@pytest.mark.parametrize("fewer", ["reduce_tokens", "drop_tokens"])
def test_a_quantizer_that_prunes_by_gradients_comes_before_tokens_leave(fewer: str) -> None:
    gradients, none = STAGES["sparsegpt_gptq"]
    with pytest.raises(RecipeError, match=r"stages\.1 \(sparsegpt_gptq\): takes gradients"):
        read(FEWER[fewer], gradients)
    read(FEWER[fewer], none)
