from __future__ import annotations

import time

import pytest

from pocketvlm.errors import RecipeError
from pocketvlm.models.patterns import compile_pattern, pattern_matches


def test_a_whole_name_matches_or_its_beginning():
    assert pattern_matches(r"lm_head|.*\.embed_tokens", "model.embed_tokens")
    assert not pattern_matches("model", "model.embed_tokens")
    assert pattern_matches("model", "model.embed_tokens", whole=False)


@pytest.mark.parametrize("text", ["(", "[a", "(?P<a>", "*", "a{2,1}", "x" * 2**21, "(" * 900])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError, match="is not a regular expression|has 2097152 characters"):
        compile_pattern(text)


def test_an_expression_that_never_ends_is_stopped():
    start = time.monotonic()
    with pytest.raises(RecipeError, match="takes too long"):
        pattern_matches("(a|aa)+b", "a" * 60)
    assert time.monotonic() - start < 10


def test_a_rule_that_names_every_layer_of_a_large_model_is_no_long_pattern():
    """As `mixed` writes them."""
    names = [f"model\\.language_model\\.layers\\.{i}\\.mlp\\.down_proj" for i in range(800)]
    assert pattern_matches("|".join(names), "model.language_model.layers.799.mlp.down_proj")
