"""add_grid: torch and the runtime cut pictures by both grids, and prompts follow."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.add_grid import AddGrid
from pocketvlm.compress.tokens.limit_tiles import LimitTiles
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, RecipeError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.images.reading import parse_image_settings
from pocketvlm.models.images.tilings import AspectGrid, SecondGrid, TwoGrids
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.processor import user_message
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference_graph.forward import embed_prompts, encode_images, greedy_generate
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.stages import PlanState
from tests.processor.test_tiles import SIZES, picture

SAMPLES = CalibrationSet.synthetic(1)
CONTEXT = RunContext(threads=1)
TILING = AspectGrid(side=32, fewest=1, most=12, second=SecondGrid())


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("double") / "model"
    write_tiny_model("internvl3", folder)
    return AddGrid(fewest=2, most=6).apply(Checkpoint.load(folder), SAMPLES, CONTEXT)


def test_torch_and_the_runtime_cut_alike(doubled, tmp_path):
    processor = doubled.processor
    runtime = ImagePreprocessor.from_settings(processor.image_processor.settings)
    twice = 0
    for size in SIZES[::2]:
        image = picture(size)
        grid = runtime.grid(image)
        np.testing.assert_array_equal(processor.pixels([image]).numpy(), runtime.pixels(image))
        assert processor.grids([image]) == [grid]
        assert grid.tiles == len(runtime.pixels(image)) <= doubled.spec.tiling.most_tiles
        ids = processor.encode([user_message("what?")], [grid])
        count = ids.count(processor.spec.image_token_id)
        assert count == grid.tiles * processor.spec.visual_tokens
        twice += isinstance(grid, TwoGrids)
    assert twice
    doubled.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert again.spec.tiling == doubled.spec.tiling == processor.tiling
    assert any("cut by a second grid as well" in note for note in again.processor.notes)
    assert doubled.history[-1].metrics["tiles"] > doubled.history[-1].metrics["before"]


def test_tiles_are_those_of_the_picture_resized_for_each_grid(doubled):
    """Every tile, in order: of the second grid, of the first, the whole."""
    tiling = doubled.spec.tiling
    assert isinstance(tiling, AspectGrid)
    image, side = picture((150, 100)), tiling.side
    grid = tiling.grid(150, 100)
    assert isinstance(grid, TwoGrids)
    settings = doubled.processor.image_processor.settings
    expected = []
    for rows, columns in (
        (grid.second_rows, grid.second_columns),
        (grid.rows, grid.columns),
        (1, 1),
    ):
        resized = image.resize((columns * side, rows * side), Image.Resampling(settings.resample))
        values = np.asarray(resized, np.float64).reshape(rows, side, columns, side, 3)
        expected += [*values.swapaxes(1, 2).reshape(-1, side, side, 3)]
    levels = (np.stack(expected) / 255 - settings.image_mean) / settings.image_std
    found = doubled.processor.pixels([image]).numpy()
    np.testing.assert_allclose(found, np.moveaxis(levels, -1, 1), atol=1e-5)


@given(width=st.integers(1, 900), height=st.integers(1, 900))
def test_the_second_grid_is_mini_monkeys(width, height):
    first, found = TILING.grid(width, height), TILING.second_grid(width, height)
    if found is None:
        assert (first.rows, first.columns) == (1, 1)
        return
    assert isinstance(first, TwoGrids)
    ratio = Fraction(width, height)
    grids = [(columns, rows) for columns in range(1, 8) for rows in range(1, 8)]
    grids = [grid for grid in grids if 3 <= grid[0] * grid[1] <= 7]
    other = [grid for grid in grids if first.columns % grid[0] or first.rows % grid[1]]
    assert found in other
    # By number of tiles the nearest grid alone can be asked for; here that costs nothing.
    nearest = min(abs(ratio - Fraction(*grid)) for grid in other)
    assert abs(ratio - Fraction(*found)) == pytest.approx(nearest, abs=1e-12)


def test_the_whole_shows_a_tile_of_each_grid():
    grid = TwoGrids(rows=2, columns=2, second_rows=1, second_columns=3)
    second, first = grid.shown_by_whole(4)
    assert second.reshape(4, 4).tolist() == [[0, 1, 1, 2]] * 4
    assert first.reshape(4, 4).tolist() == [[3, 3, 4, 4]] * 2 + [[5, 5, 6, 6]] * 2
    assert (grid.whole, grid.tiles, len(grid.parts)) == (7, 8, 7)
    assert replace(grid, left_out=(1,)).most_rows(16, 4, 8) == 6 * 4 + 8


def test_a_bundle_answers_as_torch_does(doubled, tmp_path):
    write_graphs(
        doubled, (ToOnnx(accuracy_level=0, tower_accuracy_level=0),), tmp_path, "", CONTEXT
    )
    bundle = Bundle.open(tmp_path)
    endless = replace(bundle.manifest.generation, eos_token_ids=())
    talk = Conversation(replace(bundle, manifest=replace(bundle.manifest, generation=endless)))
    images = [picture((150, 100)), picture((30, 30))]
    answer = talk.ask("what?", images, max_new_tokens=8)
    processor = doubled.processor
    grids = processor.grids(images)
    with torch.inference_mode():
        ids = torch.tensor([processor.encode([user_message("what?", images=2)], grids)])
        visual = encode_images(doubled, processor.pixels(images, grids))
        inputs = embed_prompts(doubled, ids, visual, grids)
        (expected,) = greedy_generate(doubled, inputs, max_new_tokens=8)
    assert list(answer.token_ids) == expected
    assert answer.timings.visual_tokens == (
        sum(grid.tiles for grid in grids) * doubled.spec.visual_tokens
    )


def test_a_plan_counts_the_tiles_and_warns(doubled):
    before = replace(doubled.spec, tiling=replace(doubled.spec.tiling, second=None))
    planned = AddGrid(fewest=2, most=6).plan(PlanState.of(before))
    assert planned.spec.tiling == doubled.spec.tiling
    assert "adds tiles, and so runs of the tower and tokens" in planned.notes[-1]
    with pytest.raises(RecipeError, match="cut by a second grid as well; limit tiles before it"):
        LimitTiles(max_tiles=2).plan(planned)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llava", "this model's pictures are not cut into tiles"),
        ("smolvlm-tiles", "prompts name the place of a tile in one grid"),
        ("llava-next", "or make one map of all tiles"),
    ],
)
def test_models_whose_prompts_know_one_grid_are_refused(tmp_path, name, message):
    write_tiny_model(name, tmp_path)
    with pytest.raises(RecipeError, match=f"^add_grid: .*{message}"):
        AddGrid().plan(PlanState.of(Checkpoint.load(tmp_path).spec))


@pytest.mark.parametrize(("fewest", "most"), [(1, 4), (5, 4), (2, 65)])
def test_numbers_of_tiles_that_cannot_be_are_refused(fewest, most):
    with pytest.raises(ValueError, match="allowed are 2 to 64, the first no more than the second"):
        AddGrid(fewest=fewest, most=most)


@pytest.mark.parametrize(
    ("kind", "family", "second", "message"),
    [
        ("GotOcr2ImageProcessor", "internvl", {"fewest": 9, "most": 2}, "allowed are 2 to 64"),
        ("GotOcr2ImageProcessor", "internvl", {"few": 2}, "second_grid"),
        ("LlavaNextImageProcessor", "llava_next", {}, "second_grid is followed where pictures are"),
    ],
)
def test_settings_of_a_file_that_mean_nothing_are_refused(kind, family, second, message):
    config = {"image_processor_type": kind, "second_grid": second}
    if kind == "LlavaNextImageProcessor":
        config |= {
            "size": {"shortest_edge": 28},
            "crop_size": 28,
            "image_grid_pinpoints": [[28, 56]],
        }
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_image_settings(config, Path("p.json"), family, error=CheckpointError)
    assert "\n" not in str(caught.value)
