"""limit_tiles: the processor cuts fewer tiles, and stock transformers follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.limit_tiles import LimitTiles
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError, CheckpointError, RecipeError
from pocketvlm.export.coreml.swift import render_swift
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.models.images.tilings import SplitGrid
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.stages import PlanState


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles") / "model"
    write_tiny_model("smolvlm-tiles", folder)
    return folder


def limit(checkpoint: Checkpoint, tiles: int) -> Checkpoint:
    samples = CalibrationSet.synthetic(1)
    return LimitTiles(max_tiles=tiles).apply(checkpoint, samples, RunContext(threads=1))


@pytest.mark.parametrize(("tiles", "most"), [(1, 1), (4, 1), (5, 5), (9, 5)])
def test_stock_cuts_the_same_tiles_afterwards(path, tmp_path, tiles, most):
    done = limit(Checkpoint.load(path), tiles)
    assert done.spec.tiling is not None
    assert done.spec.tiling.most_tiles == most
    assert done.history[-1].metrics == {"max_tiles": most, "of": 10}
    done.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert again.spec == done.spec
    stock = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
    picture = Image.fromarray(noise)
    expected = stock(images=[[picture]], return_tensors="np")["pixel_values"][0]
    assert len(expected) == most
    for checkpoint in (done, again):
        np.testing.assert_array_equal(checkpoint.processor.pixels([picture]).numpy(), expected)
        own = ImagePreprocessor.from_settings(checkpoint.processor.image_processor.settings)
        np.testing.assert_array_equal(own.pixels(picture), expected)


@pytest.mark.parametrize(("tiles", "most"), [(1, 1), (3, 3), (5, 5), (13, 13)])
def test_a_smaller_grid_is_followed_by_stock(tmp_path, tiles, most):
    write_tiny_model("internvl3.5", tmp_path / "model")
    done = limit(Checkpoint.load(tmp_path / "model"), tiles)
    assert done.spec.tiling is not None
    assert done.spec.tiling.most_tiles == most
    done.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert again.spec == done.spec
    stock = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 700, 3), np.uint8))
    expected = stock(images=[picture], return_tensors="np", crop_to_patches=True)["pixel_values"]
    assert len(expected) == most
    for checkpoint in (done, again):
        np.testing.assert_array_equal(checkpoint.processor.pixels([picture]).numpy(), expected)


@pytest.mark.parametrize("tiles", [10, 11])
def test_what_is_few_enough_stays_with_a_note(path, tiles):
    before = Checkpoint.load(path)
    done = limit(before, tiles)
    assert done.spec == before.spec
    (note,) = done.history[-1].notes
    assert note == f"limit_tiles: a picture becomes 10 of at most {tiles} tiles already"
    state = PlanState.of(before.spec)
    assert LimitTiles(max_tiles=tiles).plan(state).notes == (note,)


def test_a_model_without_tiles_stays_with_a_note(tiny_path):
    before = Checkpoint.load(tiny_path)
    assert limit(before, 5).spec == before.spec


def test_a_first_size_of_two_edges_becomes_one():
    limited = LimitTiles(max_tiles=5).limited(SplitGrid(side=64, first=(256, 192)))
    assert limited == SplitGrid(side=64, first=128)


def test_no_tile_at_all_is_refused():
    with pytest.raises(ValueError, match="max_tiles is 0; at least 1 is needed"):
        LimitTiles(max_tiles=0)


def test_the_swift_file_refuses_tiles(path, tmp_path):
    target = ToCoreml(context=448)
    write_graphs(Checkpoint.load(path), (target,), tmp_path / "b", "", RunContext(threads=1))
    with pytest.raises(BundleError, match="answers about pictures of one tile"):
        render_swift(Bundle.open(tmp_path / "b"))


def test_a_model_that_states_its_resolutions_itself_has_fewer_of_them(tmp_path):
    write_tiny_model("llava-next", tmp_path / "model")
    before = Checkpoint.load(tmp_path / "model")
    done = limit(before, 3)
    assert done.spec.tiling is not None
    assert done.spec.tiling.most_tiles == 3
    assert done.config["image_grid_pinpoints"] == [[32, 64], [64, 32]]
    done.save(tmp_path / "saved")
    assert Checkpoint.load(tmp_path / "saved").spec == done.spec
    with pytest.raises(RecipeError, match="max_tiles is 2; every picture of this model is cut"):
        limit(before, 2)
    config = dict(before.config, image_grid_pinpoints=[[32, 32]])
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cuts pictures otherwise than config.json says"):
        Checkpoint.load(tmp_path / "model")
