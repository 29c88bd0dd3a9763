"""tile_budget: what a recipe may ask, what a plan says of it, and what a checkpoint keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pocketvlm.bundle import TileBudget
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.config import read_spec
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, RecipeError
from pocketvlm.models.images.tilings import LargeGrid
from pocketvlm.models.picture_size import PictureSize
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference.random_models import tiny_config, write_tiny_model
from pocketvlm.stages import PlannedVision, PlanState

NO_CALIBRATION: Any = None  # token reduction looks at no data


def stage_of(budget: dict[str, Any], **options: Any) -> ReduceTokens:
    asked = {"keep": [4, 12, 8], "reducer": {"kind": "distinct_features"}, **options}
    document = {"schema": 1, "name": "budget", "stages": [{"method": "reduce_tokens", **asked}]}
    document["stages"][0]["tile_budget"] = budget
    (stage,) = recipe_from_document(document, where="budget").stages
    assert isinstance(stage, ReduceTokens)
    return stage


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A model with tiles of 16 tokens."""
    folder = tmp_path_factory.mktemp("budgets") / "model"
    write_tiny_model("smolvlm-tiles", folder)
    found = Checkpoint.load(folder).spec
    assert found.visual_tokens == 16
    return found


@pytest.mark.parametrize(
    ("budget", "planned"),
    [
        (
            {"kind": "whole_finer", "whole": 0.75, "tile": 4},
            TileBudget(whole=12, tile=4, levels=(4,), by="nothing"),
        ),
        (
            {"kind": "detail", "whole": 8, "tile": 6},
            TileBudget(whole=8, tile=6, levels=(4, 8, 12), by="detail"),
        ),
        (
            {"kind": "hired", "whole": 12, "tile": 0.5},
            TileBudget(whole=12, tile=8, levels=(4, 8, 12), by="whole_tokens"),
        ),
    ],
)
def test_a_plan_has_the_budget_and_counts_by_it(spec, budget, planned):
    state = stage_of(budget).plan(PlanState.of(spec))
    assert state.tile_budget == planned
    assert spec.tiling is not None
    grid = spec.tiling.grid(96, 96)
    assert state.most_rows(grid) == len(grid.parts) * planned.tile + planned.whole
    assert all(each.tile_budget is None for each in state.each_vision())


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ({"kind": "whole_finer", "whole": 10, "tile": 4}, {}, "whole 10 is 10 tokens, and keep"),
        ({"kind": "whole_finer", "whole": 12, "tile": 5}, {}, "tile 5 is 5 tokens, and keep makes"),
        ({"kind": "whole_finer", "whole": 17, "tile": 4}, {}, "17 is more than the 16 visual"),
        ({"kind": "hired", "whole": 12, "tile": 12}, {}, "allowed are more than the fewest and"),
        ({"kind": "detail", "whole": 12, "tile": 4}, {}, "no tile could differ"),
        ({"kind": "hired", "whole": 8, "tile": 8}, {"keep": 8}, "for 8 alone; name several"),
        (
            {"kind": "hired", "whole": 8, "tile": 6},
            {"reducer": {"kind": "uniform_stride"}},
            "uniform_stride keeps the same of every picture",
        ),
        (
            {"kind": "hired", "whole": 8, "tile": 6},
            {"reducer": {"kind": "average_pool"}, "keep": [4, 8]},
            "average_pool keeps the same of every picture",
        ),
        (
            {"kind": "hired", "whole": 16, "tile": 8},
            {"keep": [4, 16]},
            "whole keeps all 16; allowed are fewer",
        ),
    ],
)
def test_what_a_model_or_keep_does_not_allow_is_refused_by_plan(spec, budget, options, message):
    with pytest.raises(RecipeError, match=message) as caught:
        stage_of(budget, **options).plan(PlanState.of(spec))
    assert str(caught.value).startswith("reduce_tokens: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"kind": "whole_finer", "whole": 0, "tile": 4}, r"tile_budget\.?.*whole is 0; a count is"),
        ({"kind": "whole_finer", "whole": 4, "tile": 1.5}, "tile is 1.5; allowed are a share"),
        ({"kind": "whole_finer", "whole": 4}, "tile: is missing"),
        ({"kind": "even", "whole": 4, "tile": 4}, "allowed are whole_finer, detail, hired"),
        ({"kind": "hired", "whole": 4, "tile": 4, "alpha": 1}, "unknown key of kind hired"),
        (0.5, "write {kind: whole_finer}"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_the_recipe(budget, message):
    with pytest.raises(RecipeError, match=message):
        stage_of(budget)


BUDGET = {"kind": "hired", "whole": 12, "tile": 6}


def test_models_without_tiles_or_without_the_whole_are_refused(spec):
    with pytest.raises(RecipeError, match="pictures are not cut into tiles"):
        stage_of(BUDGET).plan(PlanState.of(replace(spec, tiling=None)))
    plain = read_spec(tiny_config("lfm2-vl-tiles"))
    tiling = LargeGrid(
        side=32, fewest=2, most=4, patch=8, unit=16, most_pixels=1024, has_whole=False
    )
    keep = [plain.visual_tokens - 1, 1]
    budget = {"kind": "whole_finer", "whole": keep[0], "tile": 1}
    with pytest.raises(RecipeError, match="use_thumbnail must be true"):
        stage_of(budget, keep=keep).plan(PlanState.of(replace(plain, tiling=tiling)))


def test_pictures_of_several_sizes_are_refused(spec):
    other = PlannedVision(size=PictureSize(height=32, width=32), visual_tokens=16)
    state = replace(PlanState.of(spec), other_vision=(other,))
    with pytest.raises(RecipeError, match="tile_budget is for tiles of one size"):
        stage_of(BUDGET).budget(state.spec, [other.size])


def test_a_checkpoint_keeps_its_budget_and_its_graphs_have_none(tmp_path):
    write_tiny_model("smolvlm-tiles", tmp_path / "model")
    stage = stage_of(BUDGET)
    done = stage.apply(load_checkpoint(tmp_path / "model"), NO_CALIBRATION, RunContext())
    assert done.tile_budget == stage.plan(PlanState.of(done.spec)).tile_budget is not None
    assert done.history[-1].metrics["tile_budget"] == done.tile_budget.describe()
    assert PlanState.of_checkpoint(done).tile_budget == done.tile_budget
    assert [seen.tile_budget for seen in done.each_vision()] == [None, None, None]
    done.save(tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved").tile_budget == done.tile_budget
    odd = replace(done.tile_budget, whole=11)
    replace(done, tile_budget=odd).save(tmp_path / "odd")
    with pytest.raises(CheckpointError, match="tile_budget: no vision graph keeps 11 visual"):
        load_checkpoint(tmp_path / "odd")
