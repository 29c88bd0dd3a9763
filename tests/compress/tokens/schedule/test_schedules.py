"""Every kind of schedule: what was published, what a plan says, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketvlm.bundle import Bundle, VisualDrop
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.schedule.fast_v import FastV
from pocketvlm.compress.tokens.schedule.listed import Drop, Listed
from pocketvlm.compress.tokens.schedule.progressive import Progressive
from pocketvlm.compress.tokens.schedule.pyramid_drop import PyramidDrop
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.plan import plan
from pocketvlm.pipeline.plan_memory import TURN_TOKENS
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference.shapes import load_shape
from pocketvlm.runtime.onnx.runner import OnnxRunner


def teramacs(rows: tuple[int, ...], hidden: int = 4096, ffn: int = 11008) -> float:
    """Of a LLaMA-7B's layers on visual rows alone, as the papers count them."""
    return sum(4 * n * hidden**2 + 2 * n**2 * hidden + 3 * n * hidden * ffn for n in rows) / 1e12


def test_pyramid_drop_is_the_published_one() -> None:
    """Table 1 of arXiv 2410.17247: 20.8 T become 9.46, and 3.82 T become 1.78."""
    for tokens, whole, dropped in ((2880, 20.8, 9.46), (576, 3.82, 1.78)):
        schedule = PyramidDrop().plan(32, tokens)
        halves = [(8, tokens // 2), (16, tokens // 4), (24, tokens // 8)]
        assert [(drop.layers, drop.keep) for drop in schedule.drops] == halves
        assert (schedule.ranked_in, schedule.positions) == ("layer_after", "consecutive")
        assert teramacs((tokens,) * 32) == pytest.approx(whole, rel=3e-3)
        assert teramacs(schedule.rows_by_layer(32, tokens)) == pytest.approx(dropped, rel=3e-3)


def test_fast_v_is_the_published_one() -> None:
    """Half of the tokens after two layers, at their positions; 57 % of the work after three."""
    schedule = FastV().plan(32, 576)
    assert schedule.drops == (VisualDrop(layers=2, keep=288),)
    assert (schedule.ranked_in, schedule.positions) == ("layer_before", "original")
    after_three = FastV(first_layers=3).plan(32, 576)
    share = teramacs(after_three.rows_by_layer(32, 576)) / teramacs((576,) * 32)
    assert share == pytest.approx(0.54, abs=0.03)


def test_progressive_falls_by_an_eighth_from_layer_14_to_none_at_21() -> None:
    schedule = Progressive().plan(28, 128)
    assert [(drop.layers, drop.keep) for drop in schedule.drops] == [
        (14 + step, 128 - 16 * (step + 1)) for step in range(8)
    ]
    # With few tokens, steps that take none are left out.
    few = Progressive().plan(28, 3)
    assert [(drop.layers, drop.keep) for drop in few.drops][-1] == (21, 0)
    assert len(few.drops) <= 3


def test_shares_and_numbers_may_be_listed() -> None:
    by_share = Listed(drops=(Drop(first_layers=0.5, keep=0.25), Drop(first_layers=0.75, keep=0)))
    by_number = Listed(drops=(Drop(first_layers=4, keep=16), Drop(first_layers=6, keep=0)))
    assert by_share.plan(8, 64) == by_number.plan(8, 64)


def recipe(schedule: dict[str, Any], *before: dict[str, Any]) -> Any:
    stages = [*before, {"method": "drop_tokens", "schedule": schedule}]
    document = {"schema": 1, "name": "x", "stages": stages, "targets": [{"method": "onnx"}]}
    return recipe_from_document(document, where="x")


LISTED = {"kind": "listed", "drops": [{"first_layers": 2, "keep": 8}]}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "fast_v", "keep": 16}, r"tile are \[16, 16\] .*what was dropped cannot return"),
        ({"kind": "fast_v", "keep": 17}, "what was dropped cannot return"),
        ({"kind": "fast_v", "keep": 0}, "keep is 0; allowed are 1 and more visual tokens"),
        ({"kind": "fast_v", "keep": 1.5}, r"allowed are a share in \(0, 1\)"),
        ({"kind": "fast_v", "first_layers": 4}, "dropped after 4 layers; allowed are 1 to 3"),
        ({"kind": "pyramid_drop", "stages": 5}, "5 stages are more than the 4 layers"),
        ({"kind": "pyramid_drop", "stages": 1}, "allowed are 2 and more"),
        ({"kind": "pyramid_drop", "ratio": 1.0}, r"allowed is a ratio in \(0, 1\)"),
        ({"kind": "progressive", "first": 3, "last": 2}, "first layer that is not after the last"),
        ({"kind": "listed"}, "drops is empty"),
        (
            {"kind": "listed", "drops": [*LISTED["drops"], {"first_layers": 3, "keep": 9}]},
            "fewer from place to place: what was dropped cannot return",
        ),
        (
            {"kind": "listed", "drops": [*LISTED["drops"], {"first_layers": 2, "keep": 4}]},
            "allowed are 1 and more, ascending",
        ),
        (
            {"kind": "listed", "drops": [*LISTED["drops"], {"first_layers": 3, "keep": 0.1}]},
            "allowed are shares, or numbers",
        ),
        ({"kind": "fastv"}, "fast_v"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_by_the_plan(
    deep_paths: dict[str, Path], schedule: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        plan(deep_paths["llava"], recipe(schedule))
    assert "\n" not in str(caught.value)


def test_positions_on_three_axes_are_not_recounted() -> None:
    shape = load_shape("qwen2-vl-2b")
    with pytest.raises(RecipeError, match="cannot be recounted; allowed is original"):
        plan(shape, recipe({"kind": "pyramid_drop"}))
    plan(shape, recipe({"kind": "pyramid_drop", "positions": "original"}))


def test_the_former_stage_is_told_how_it_is_written_now() -> None:
    former = {"method": "skip_visual", "first_layers": 0.5}
    with pytest.raises(RecipeError, match="method: drop_tokens") as caught:
        recipe_from_document({"schema": 1, "name": "x", "stages": [former]}, where="x")
    assert "first_layers: 0.5" in str(caught.value)


@pytest.mark.parametrize(
    "schedule",
    [{"kind": "fast_v", "first_layers": 1}, {"kind": "pyramid_drop"}, {"kind": "progressive"}],
)
def test_the_cache_is_as_large_as_the_plan_says(
    deep_paths: dict[str, Path], tmp_path: Path, schedule: dict[str, Any]
) -> None:
    made = recipe(schedule, {"method": "reduce_tokens", "keep": 0.75})
    planned = plan(deep_paths["llava"], made)
    reducer, drop = made.stages
    checkpoint = Checkpoint.load(deep_paths["llava"])
    checkpoint = replace(
        checkpoint,
        reducer=reducer.build(checkpoint.spec),
        visual_schedule=drop.schedule.plan(4, planned.visual_tokens),
    )
    write_graphs(checkpoint, (ToOnnx(),), tmp_path, "", RunContext(threads=1))
    rows = planned.visual_tokens + TURN_TOKENS
    engine = OnnxRunner(Bundle.open(tmp_path), threads=1, capacity=rows)
    embeds = np.random.default_rng(0).standard_normal((1, rows, 64), np.float32)
    flags = np.zeros(rows, np.bool_)
    flags[3 : 3 + planned.visual_tokens] = True
    engine.decode(embeds, np.arange(rows)[None] % 128, flags)
    assert engine.held_bytes == planned.kv_cache_bytes
