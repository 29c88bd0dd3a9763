"""choose_grid: torch and the runtime cut pictures as the rule says, and prompts follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.choose_grid import ChooseGrid
from pocketvlm.compress.tokens.limit_tiles import LimitTiles
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, RecipeError
from pocketvlm.models.images.reading import parse_image_settings
from pocketvlm.models.images.tilings import SplitGrid
from pocketvlm.models.images.tilings.grid_rules import GridRule, RelaxedRatio, SliceCount
from pocketvlm.processor import user_message
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.stages import PlanState
from tests.processor.test_tiles import SIZES, picture

SAMPLES = CalibrationSet.synthetic(1)
CONTEXT = RunContext(threads=1)
RULES: tuple[GridRule, ...] = (RelaxedRatio(alpha=0.6), SliceCount())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("name", ["smolvlm-tiles", "llava-next"])
def test_torch_and_the_runtime_cut_alike(name: str, rule: GridRule, tmp_path: Path):
    write_tiny_model(name, tmp_path / "model")
    before = Checkpoint.load(tmp_path / "model")
    done = ChooseGrid(rule=rule).apply(before, SAMPLES, CONTEXT)
    processor, runtime = (
        done.processor,
        ImagePreprocessor.from_settings(done.processor.image_processor.settings),
    )
    changed = 0
    for size in SIZES[::2]:
        image = picture(size)
        grid = runtime.grid(image)
        np.testing.assert_array_equal(processor.pixels([image]).numpy(), runtime.pixels(image))
        assert processor.grids([image]) == [grid]
        ids = processor.encode([user_message("what?")], [grid])
        count = ids.count(processor.spec.image_token_id)
        assert count == grid.placeholders(processor.spec.visual_tokens)
        changed += grid != before.processor.grids([image])[0]
    assert changed
    done.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert again.spec.tiling == done.spec.tiling == processor.tiling
    assert any(f"cut as {rule.kind} says" in note for note in again.processor.notes)
    planned = ChooseGrid(rule=rule).plan(PlanState.of(before.spec))
    assert planned.spec.tiling == done.spec.tiling


def test_pixels_of_a_tile_are_those_of_the_resized_picture(tmp_path):
    write_tiny_model("smolvlm-tiles", tmp_path)
    done = ChooseGrid(rule=SliceCount()).apply(Checkpoint.load(tmp_path), SAMPLES, CONTEXT)
    tiling = done.processor.tiling
    assert isinstance(tiling, SplitGrid)
    image, side = picture((150, 40)), tiling.side
    grid = tiling.grid(150, 40)
    assert (grid.rows, grid.columns) == (1, 3)
    resized = image.resize((3 * side, side), Image.Resampling(1))
    tiles = [resized.crop((side * x, 0, side * x + side, side)) for x in range(3)]
    values = np.stack([*map(np.asarray, tiles), np.asarray(resized.resize((side, side), 1))])
    expected = (values.astype(np.float64) * (1 / 255) - 0.5) / 0.5
    found = done.processor.pixels([image]).numpy()
    np.testing.assert_allclose(found, np.moveaxis(expected, -1, 1), atol=1e-6)


def test_it_stands_beside_a_limit(tmp_path):
    write_tiny_model("smolvlm-tiles", tmp_path)
    limited = LimitTiles(max_tiles=5).apply(Checkpoint.load(tmp_path), SAMPLES, CONTEXT)
    done = ChooseGrid(rule=RelaxedRatio(alpha=0.2)).apply(limited, SAMPLES, CONTEXT)
    again = LimitTiles(max_tiles=4).apply(done, SAMPLES, CONTEXT)
    assert done.spec.tiling is not None
    assert again.spec.tiling is not None
    assert (done.spec.tiling.most_tiles, again.spec.tiling.most_tiles) == (5, 1)
    with pytest.raises(RecipeError, match="choose_grid: this model's pictures are not cut"):
        ChooseGrid().plan(PlanState.of(again.spec))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llava", "this model's pictures are not cut into tiles"),
        ("internvl3", "cannot be told the grid of a picture"),
        ("lfm2-vl-tiles", "cannot be told the grid of a picture"),
    ],
)
def test_models_that_follow_no_other_rule_are_refused(tmp_path, name, message):
    write_tiny_model(name, tmp_path)
    with pytest.raises(RecipeError, match=f"^choose_grid: .*{message}"):
        ChooseGrid().plan(PlanState.of(Checkpoint.load(tmp_path).spec))


def test_pictures_of_one_grid_are_refused(tmp_path):
    write_tiny_model("smolvlm-tiles", tmp_path)
    spec = Checkpoint.load(tmp_path).spec
    spec = replace(spec, tiling=SplitGrid(side=64, first=(128, 128)))
    with pytest.raises(RecipeError, match="size names height and width"):
        ChooseGrid().plan(PlanState.of(spec))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"grid_rule": {"kind": "widest"}},
            'grid_rule.kind: is "widest"; allowed: relaxed_ratio, slice_count',
        ),
        ({"grid_rule": {"kind": "relaxed_ratio", "alpha": 2}}, "alpha is 2.0; allowed are 0 to 1"),
        ({"do_image_splitting": False}, "grid_rule needs do_image_splitting"),
        ({"size": {"height": 64, "width": 64}}, "size to name longest_edge"),
    ],
)
def test_settings_of_a_file_that_mean_nothing_are_refused(changes, message):
    config = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 128},
        "max_image_size": {"longest_edge": 64},
        "grid_rule": {"kind": "slice_count"},
        **changes,
    }
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_image_settings(config, Path("p.json"), "idefics3", error=CheckpointError)
    assert "\n" not in str(caught.value)


def test_a_processor_that_cannot_be_told_of_one_picture_is_refused():
    config = {"image_processor_type": "GotOcr2ImageProcessor", "grid_rule": {"kind": "slice_count"}}
    with pytest.raises(CheckpointError, match="grid_rule is followed where pictures are cut as"):
        parse_image_settings(config, Path("p.json"), "internvl", error=CheckpointError)
