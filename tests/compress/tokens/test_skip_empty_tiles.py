"""skip_empty_tiles: torch and the runtime leave out the same tiles, of pixels and of prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.config import read_spec
from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.compress.tokens.limit_tiles import LimitTiles
from pocketvlm.compress.tokens.skip_empty_tiles import SkipEmptyTiles
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, InputError, RecipeError
from pocketvlm.export.executorch.schema import position_channels
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.images.reading import parse_image_settings
from pocketvlm.models.images.tilings import LargeGrid
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.source_check import verify_folder
from pocketvlm.processor import user_message
from pocketvlm.prompt.messages import user_turn
from pocketvlm.reference.random_models import tiny_config, write_tiny_model
from pocketvlm.reference_graph.forward import embed_prompts, encode_images, greedy_generate
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.executorch.native_runner import prompt_parts
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.text import TextCodec
from pocketvlm.stages import PlanState

CONTEXT = RunContext(threads=1)
NAMES = ("smolvlm-tiles", "lfm2-vl-tiles", "internvl3", "llava-next", "llava-onevision")


def picture(width: int = 192, height: int = 192) -> Image.Image:
    """Nothing but two squares: one in the first quarter, one in the third."""
    pixels = np.full((height, width, 3), 220, np.uint8)
    pixels[height // 8 : height // 4, width // 8 : width // 4] = (200, 30, 30)
    pixels[5 * height // 8 : 6 * height // 8, width // 8 : width // 4] = (30, 30, 200)
    return Image.fromarray(pixels)


def skipping(checkpoint: Checkpoint, contrast: int = 12) -> Checkpoint:
    samples = CalibrationSet.synthetic(2)
    return SkipEmptyTiles(contrast=contrast).apply(checkpoint, samples, CONTEXT)


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("empty") / request.param
    write_tiny_model(request.param, folder)
    return skipping(Checkpoint.load(folder))


def test_pixels_are_those_of_the_tiles_that_show_something(checkpoint, tmp_path):
    shown, blank = picture(), Image.new("RGB", (190, 180))  # as black as a canvas
    processor = checkpoint.processor
    runtime = ImagePreprocessor.from_settings(processor.image_processor.settings)
    plain = replace(runtime, empty_tiles=None)
    grid = processor.grids([shown])[0]
    assert runtime.grid(shown) == grid
    assert 1 < grid.tiles < grid.all_tiles
    every = plain.pixels(shown)
    np.testing.assert_array_equal(processor.pixels([shown]).numpy(), every[grid.seen])
    np.testing.assert_array_equal(runtime.pixels(shown), every[grid.seen])
    # Of a blank one the whole alone is seen, which comes first or last.
    (nothing,) = processor.grids([blank])
    assert (nothing.tiles, nothing.left_out) == (1, tuple(nothing.parts))
    np.testing.assert_array_equal(processor.pixels([blank]), plain.pixels(blank)[nothing.seen])
    checkpoint.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert again.processor.empty_tiles == processor.empty_tiles
    assert again.processor.grids([shown]) == [grid]


def test_a_bundle_answers_as_torch_does(checkpoint, tmp_path):
    """Reduced tokens beside tiles that are left out; a second picture, and a second turn."""
    reducer = FixedReducer((1, 2), positions="original")
    reduced = replace(checkpoint, reducer=reducer)
    write_graphs(reduced, (ToOnnx(),), tmp_path, "", CONTEXT)
    bundle = Bundle.open(tmp_path)
    endless = replace(bundle.manifest.generation, eos_token_ids=())
    talk = Conversation(replace(bundle, manifest=replace(bundle.manifest, generation=endless)))
    images = [picture(), picture(192, 96)]
    answer = talk.ask("what?", images, max_new_tokens=12)
    processor = reduced.processor
    grids = processor.grids(images)
    messages = [user_message("what?", images=2)]
    with torch.inference_mode():
        ids = torch.tensor([processor.encode(messages, grids)])
        visual = encode_images(reduced, processor.pixels(images, grids))
        inputs = embed_prompts(reduced, ids, visual, grids)
        (expected,) = greedy_generate(reduced, inputs, max_new_tokens=12)
    assert list(answer.token_ids) == expected
    assert answer.timings.visual_tokens == int(inputs.is_visual.sum())
    most = sum(grid.most_rows(processor.spec.visual_tokens, 2) for grid in grids)
    assert answer.timings.visual_tokens <= most
    again = talk.ask("and?", max_new_tokens=2)
    assert again.timings.reused_tokens >= answer.timings.visual_tokens
    assert again.timings.vision_ms == 0


def test_a_prompt_is_the_same_and_its_positions_have_a_gap(tmp_path):
    write_tiny_model("smolvlm-tiles", tmp_path / "model")
    done = skipping(Checkpoint.load(tmp_path / "model"))
    processor, shown = done.processor, picture()
    (grid,) = processor.grids([shown])
    messages = [user_message("what?")]
    ids = processor.encode(messages, [grid])
    assert ids == processor.encode(messages, [grid.complete])
    for policy, taken in (("original", grid.all_tiles), (None, grid.all_tiles), ("consecutive", 0)):
        reducer = None if policy is None else FixedReducer((1, 2), positions=policy)
        kept = done.spec.visual_tokens if reducer is None else 2
        checkpoint = replace(done, reducer=reducer)
        with torch.inference_mode():
            visual = encode_images(checkpoint, processor.pixels([shown], [grid]))
            inputs = embed_prompts(checkpoint, torch.tensor([ids]), visual, [grid])
        text = len(ids) - grid.all_tiles * done.spec.visual_tokens
        assert inputs.embeds.shape[1] == text + grid.tiles * kept
        rows = taken * done.spec.visual_tokens if taken else grid.tiles * kept
        assert int(inputs.next_position) == text + rows
    assert position_channels(done.spec, None) == 2  # as ExecuTorch's programs tell of gaps
    assert position_channels(replace(done.spec, leaves_tiles_out=False), None) == 0


def test_a_runner_that_counts_positions_by_rows_refuses(tmp_path):
    write_tiny_model("smolvlm-tiles", tmp_path / "model")
    done = skipping(Checkpoint.load(tmp_path / "model"))
    (tmp_path / "bundle").mkdir()
    write_graphs(done, (ToOnnx(),), tmp_path / "bundle", "", CONTEXT)
    bundle = Bundle.open(tmp_path / "bundle")
    with pytest.raises(InputError, match="MultimodalRunner counts positions row by row"):
        prompt_parts(bundle, TextCodec.from_bundle(bundle), user_turn("what?", 1), [picture()])


def test_a_folder_that_states_it_is_compared_with_stock_by_all_its_tiles(tmp_path):
    write_tiny_model("smolvlm-tiles", tmp_path)
    done = skipping(Checkpoint.load(tmp_path), contrast=255)
    done.processor.save(tmp_path)
    again = Checkpoint.load(tmp_path).processor
    assert again.grids([picture()])[0].tiles == 1
    assert any("contrast below 255 are left out" in note for note in again.notes)
    report = verify_folder(tmp_path)
    assert report.verdict == "passed", report.lines()


def test_the_stage_counts_the_tiles_of_the_calibration_set(tmp_path):
    write_tiny_model("smolvlm-tiles", tmp_path / "model")
    before = Checkpoint.load(tmp_path / "model")
    blank = Image.new("RGB", (192, 192))
    samples = CalibrationSet.synthetic(2)
    rows = [Sample(image=each, question="?", answer="a") for each in (picture(), blank)]
    samples = replace(samples, samples=tuple(rows))
    done = SkipEmptyTiles().apply(before, samples, CONTEXT)
    seen = sum(grid.tiles for grid in done.processor.grids([picture(), blank]))
    assert done.history[-1].metrics == {"contrast": 12, "left_out": 20 - seen, "of": 20}
    limited = LimitTiles(max_tiles=5).apply(done, samples, CONTEXT)
    assert limited.processor.empty_tiles == done.processor.empty_tiles


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llava", "this model's pictures are not cut into tiles"),
        ("qwen2-vl", "this model's pictures are not cut into tiles"),
    ],
)
def test_models_whose_tiles_cannot_be_left_out_are_refused(tmp_path, name, message):
    write_tiny_model(name, tmp_path / "model")
    found = Checkpoint.load(tmp_path / "model")
    with pytest.raises(RecipeError, match=f"^skip_empty_tiles: {message}"):
        SkipEmptyTiles().plan(PlanState.of(found.spec))
    with pytest.raises(RecipeError, match=f"^skip_empty_tiles: {message}"):
        skipping(found)


def test_without_the_whole_picture_nothing_may_be_left_out():
    spec = read_spec(tiny_config("lfm2-vl-tiles"))
    tiling = LargeGrid(
        side=32, fewest=2, most=4, patch=8, unit=16, most_pixels=1024, has_whole=False
    )
    with pytest.raises(RecipeError, match="use_thumbnail must be true"):
        SkipEmptyTiles().plan(PlanState.of(replace(spec, tiling=tiling)))


@pytest.mark.parametrize("contrast", [0, 256])
def test_a_contrast_that_no_tile_can_have_is_refused(contrast):
    with pytest.raises(ValueError, match=f"contrast is {contrast}; allowed are 1 to 255"):
        SkipEmptyTiles(contrast=contrast)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"empty_tile_contrast": 0}, "empty_tile_contrast is 0; allowed are 1 to 255"),
        ({"empty_tile_contrast": "some"}, "empty_tile_contrast"),
        ({"do_image_splitting": False}, "pictures are not cut into tiles"),
        ({"max_image_size": {"longest_edge": 4}}, "needs tiles of 8 pixels or more"),
    ],
)
def test_settings_of_a_file_that_mean_nothing_are_refused(changes, message):
    config = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 16},
        "max_image_size": {"longest_edge": 8},
        "empty_tile_contrast": 9,
        **changes,
    }
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_image_settings(config, Path("p.json"), "idefics3", error=CheckpointError)
    assert "\n" not in str(caught.value)


def test_the_setting_stands_in_the_processors_file(checkpoint):
    processor = checkpoint.processor
    where = processor.image_processor.settings.where.name
    document = json.loads(processor.files[where])
    own = document.get("image_processor", document)
    assert own["empty_tile_contrast"] == 12
