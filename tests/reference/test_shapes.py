"""Shapes are the published models in everything but their weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from pocketvlm.checkpoint.config import read_spec_and_ignored
from pocketvlm.errors import CheckpointError
from pocketvlm.export.prediction import other_elements
from pocketvlm.pipeline.plan import plan
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.processor.image_processor import ImageProcessor
from pocketvlm.recipes.load import default_target, load_recipe
from pocketvlm.reference.random_models import tiny_config, write_shape
from pocketvlm.reference.shapes import Shape, list_shapes, load_shape
from pocketvlm.runtime.preprocess import ImagePreprocessor

PARAMETERS = {
    "gemma-3-4b": 4_300_079_472,
    "granite-docling-258m": 257_517_120,
    "internvl3-1b": 938_193_024,
    "internvl3.5-1b": 1_060_897_792,
    "internvl3.5-2b": 2_348_347_392,
    "lfm2-vl-1.6b": 1_584_804_000,
    "lfm2-vl-450m": 450_816_512,
    "llava-1.5-7b": 7_063_427_072,
    "llava-next-7b": 7_566_747_648,
    "paligemma2-3b": 3_032_242_416,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen3-vl-2b": 2_127_532_032,
    "smolvlm-2.2b": 2_246_784_880,
    "smolvlm-256m": 256_484_928,
    "smolvlm-500m": 507_482_304,
}
"""Parameters of the published weight files, as their repositories count them."""


@pytest.fixture(params=list_shapes())
def shape(request: pytest.FixtureRequest) -> Shape:
    return load_shape(request.param)


def test_a_shape_needs_no_default_of_the_library(shape):
    spec, ignored = read_spec_and_ignored(shape.config)
    assert ignored == ()
    # Some models state it themselves, and their processors the same.
    assert spec.tiling in (None, shape.spec.tiling)
    assert asdict(replace(shape.spec, tiling=spec.tiling)) == asdict(spec)


def test_a_shape_has_a_processor_that_the_library_loads(shape, tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps(shape.processor))
    processor = ImageProcessor.load(tmp_path, shape.spec)
    assert processor.settings.tiling == shape.spec.tiling
    picture = Image.new("RGB", (640, 480), (255, 127, 0))
    runtime = ImagePreprocessor.from_settings(processor.settings)
    np.testing.assert_array_equal(processor.pixels([picture]).numpy(), runtime.pixels(picture))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_the_parameters_of_the_published_files(name):
    shape = load_shape(name)
    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**shape.config))
    published = sum(weight.numel() for weight in stock.parameters())
    assert published == PARAMETERS[name]
    weights = sum(linear.out_features * linear.in_features for linear in shape.spec.linears())
    counted = weights + sum(other_elements(shape.spec))
    # Files also hold blocks that are never run; a table of positions is as large as the picture.
    assert counted == pytest.approx(published, rel=0.01)


def test_a_plan_of_a_shape_says_what_a_plan_of_its_checkpoint_says(tmp_path):
    path = write_shape(TINY, tmp_path / "model")
    assert load_checkpoint(path).spec == TINY.spec
    recipe = load_recipe("int4-small", ["stages.1.rules.0.group_size=32"])
    alone, whole = plan(TINY, recipe), plan(path, recipe)
    assert alone.part_bytes == whole.part_bytes
    assert alone.ram_bytes == whole.ram_bytes
    assert (alone.photo_tiles, alone.photo_tokens, alone.most_tiles) == (10, 10 * 8, 10)
    assert (whole.photo_tiles, whole.photo_tokens, whole.most_tiles) == (10, 10 * 8, 10)
    assert alone.refused == whole.refused == ()


def test_a_photo_that_leaves_no_room_for_text_is_told():
    text = {**TINY.config["text_config"], "max_position_embeddings": 300}
    narrow = replace(TINY, config={**TINY.config, "text_config": text})
    room = [f"{name}: a photo of 640 x 480 takes" for name in ("onnx", "executorch")]
    recipe = load_recipe("float")
    recipe = replace(recipe, targets=(*recipe.targets, default_target("executorch")))
    assert not [line for line in plan(TINY, recipe).warnings if "a photo" in line]
    told = [line for line in plan(narrow, recipe).warnings if "a photo" in line]
    assert [line.partition(" 160 of the 300 ")[0] for line in told] == room


def test_a_written_shape_is_written_again_where_it_is_another(tmp_path):
    path = tmp_path / "model"
    written = [write_shape(TINY, path).stat().st_ino, write_shape(TINY, path).stat().st_ino]
    assert written[0] == written[1]
    one_tile = write_shape(TINY, path, is_split=False)
    tiling = load_checkpoint(one_tile).spec.tiling
    assert tiling is not None
    assert tiling.most_tiles == 1


def test_an_unknown_shape_is_told_in_one_line():
    with pytest.raises(CheckpointError, match="'gpt-5' is not known; there are .*smolvlm-256m"):
        load_shape("gpt-5")


def test_the_command_writes_nothing_and_does_not_wait_for_the_library(tmp_path):
    """To import transformers takes as long as everything else, and a shape does not need it."""
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pocketvlm", *COMMAND.split()],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert (found["photo_tiles"], found["photo_tokens"]) == (13, 13 * 40)
    assert not list(tmp_path.iterdir())
    imported = [line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()]
    assert "torch" in imported
    # What runs a model is not waited for: with it, the answer takes a third longer.
    assert not {"transformers", "onnxruntime", "pocketvlm.pipeline.run"} & set(imported)


COMMAND = "plan shape:smolvlm-2.2b --device iphone-17-pro --recipe int4-small --json"

TINY = Shape(
    name="tiny",
    source="nobody/tiny",
    config=tiny_config("smolvlm"),
    processor={
        "processor_class": "SmolVLMProcessor",
        "image_seq_len": 16,
        "image_processor": {
            **load_shape("smolvlm-256m").processor["image_processor"],
            "size": {"longest_edge": 192},
            "max_image_size": {"longest_edge": 64},
        },
    },
)
