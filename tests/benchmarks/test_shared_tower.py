"""Bundles that ask one tower see what each sees with its own."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.shared_tower import SharedTower
from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.compress.tokens.diverse.important_diverse import ImportantDiverse
from pocketvlm.compress.tokens.rank.distinct_features import DistinctFeatures
from pocketvlm.compress.tokens.tower.stage import MergeTokens
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference.random_models import tiny_config, write_random_model
from pocketvlm.runtime.onnx.runner import OnnxRunner

CONTEXT = RunContext(threads=1)
TILES = 10  # more than are checked
STAGES = {
    "whole": (),
    "distinct": (ReduceTokens(reducer=DistinctFeatures(), keep=4),),
    # Reads queries and keys of the last block.
    "diverse": (ReduceTokens(reducer=ImportantDiverse(), keep=4),),
    # The tower is another from its second block on.
    "merged": (MergeTokens(first_block=1, blocks=1),),
}


def export(path, stages, folder):
    checkpoint = Checkpoint.load(path)
    for stage in stages:
        checkpoint = stage.apply(checkpoint, CalibrationSet.synthetic(1), CONTEXT)
    manifest = write_graphs(checkpoint, (ToOnnx(),), folder, "", CONTEXT)
    return Bundle(path=folder, manifest=manifest)


@pytest.fixture(scope="module")
def bundles(tiny_paths, tmp_path_factory):
    return {
        name: export(tiny_paths["llava"], stages, tmp_path_factory.mktemp(name))
        for name, stages in STAGES.items()
    }


@pytest.fixture(scope="module")
def tiles(tiny_paths):
    tower = Checkpoint.load(tiny_paths["llava"]).spec.tower
    rng = np.random.default_rng(0)
    shape = (1, 3, tower.height, tower.width)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(TILES)]


@pytest.mark.parametrize("name", STAGES)
def test_a_bundle_sees_the_same(bundles, tiles, tmp_path, name):
    shared = SharedTower(bundles["whole"], tmp_path).open(bundles[name], 1, 64)
    alone = OnnxRunner(bundles[name], threads=1)
    for pixels in tiles:
        embeds, indices = alone.encode_image(pixels)
        found, places = shared.encode_image(pixels)
        np.testing.assert_array_equal(places, indices)
        np.testing.assert_allclose(found, embeds, rtol=1e-5, atol=1e-6)


def test_the_tower_runs_once_for_each_tile(bundles, tiles, tmp_path):
    tower = SharedTower(bundles["whole"], tmp_path)
    for _ in range(2):
        runner = tower.open(bundles["distinct"], 1, 64)
        for pixels in tiles:
            runner.encode_image(pixels)
    assert tower.runs == TILES


def test_another_tower_is_found_out(bundles, tiles, tmp_path):
    """The graphs are the same node for node, and the weights are not."""
    write_random_model(tiny_config("llava"), tmp_path / "model", seed=1)
    (tmp_path / "bundle").mkdir()
    other = export(tmp_path / "model", STAGES["distinct"], tmp_path / "bundle")
    tower = SharedTower(bundles["whole"], tmp_path)
    with pytest.raises(RuntimeError, match="gives other tokens"):
        tower.open(other, 1, 64).encode_image(tiles[0])
