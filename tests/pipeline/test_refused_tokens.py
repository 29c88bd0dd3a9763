"""Reductions of visual tokens that a model cannot have: `plan` says so in one line, exit code 2."""

from __future__ import annotations

import pytest
import yaml

REFUSED = {
    "none of the tokens": ("llava", {"keep": 0}, "at least 1"),
    "a share of nothing": ("llava", {"keep": 0.0}, "allowed are a share in (0, 1]"),
    "fewer than none": ("llava", {"keep": -3}, "at least 1"),
    "more than there are": ("llava", {"keep": 17}, "allowed are 1 to 16"),
    "a share above all": ("llava", {"keep": 1.5}, "allowed are a share in (0, 1]"),
    "[CLS] attention without [CLS]": (
        "smolvlm",
        {"reducer": {"kind": "cls_attention"}, "keep": 4},
        "[CLS] token, which smolvlm does not have",
    ),
    "an ensemble of [CLS] without [CLS]": (
        "smolvlm",
        {"reducer": {"kind": "cls_ensemble"}, "keep": 4},
        "[CLS] token, which smolvlm does not have",
    ),
    "half a row": (
        "llava",
        {"reducer": {"kind": "attention_rows"}, "keep": 6},
        "whole rows of 4 visual tokens",
    ),
    "cells without a grid": (
        "llava",
        {"reducer": {"kind": "average_pool"}, "keep": 7},
        "nearest counts that it can are 6 and 8",
    ),
    "numbers of which two are one": ("llava", {"keep": [4, 0.25]}, "numbers must differ"),
    "a tile budget without tiles": (
        "llava",
        {"keep": [4, 8], "tile_budget": {"kind": "hired", "whole": 8, "tile": 4}},
        "this model's pictures are not cut into tiles",
    ),
    "a schedule that grows again": (
        "llava",
        {
            "method": "drop_tokens",
            "schedule": {
                "kind": "listed",
                "drops": [{"first_layers": 1, "keep": 4}, {"first_layers": 2, "keep": 8}],
            },
        },
        "what was dropped cannot return",
    ),
    "a schedule that keeps none at first": (
        "llava",
        {"method": "drop_tokens", "schedule": {"kind": "fast_v", "first_layers": 1, "keep": 0}},
        "allowed are 1 and more visual tokens",
    ),
    "a schedule of more than there are": (
        "llava",
        {"method": "drop_tokens", "schedule": {"kind": "fast_v", "first_layers": 1, "keep": 17}},
        "allowed are fewer after each",
    ),
    "a merge of more than there are": (
        "llava",
        {"method": "merge_tokens", "keep": 17},
        "17 of 16 patches are to remain; allowed are 1 to 15",
    ),
    "a merge that splits its rectangles": (
        "llava",
        {
            "method": "merge_tokens",
            "merger": {"kind": "neighbours"},
            "keep": 7,
            "blocks": 1,
        },
        "7 of 16 patches are to remain; neighbours leaves 8 or 4 or 2 or 1, all in one block",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_refuses_in_one_line(run_cli, tiny_paths, tmp_path, name):
    family, options, message = REFUSED[name]
    stage = {"method": "reduce_tokens", **options}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {"schema": 1, "name": "t", "stages": [stage], "targets": [{"method": "onnx"}]}
        )
    )
    code, out, err = run_cli("plan", tiny_paths[family], "--recipe", recipe)
    assert code == 2, out
    assert message in err
    assert len(err.splitlines()) == 1, err
