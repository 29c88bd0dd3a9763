"""What a stage changes in a model's shape is what its bundle is written, and described, for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.compress.pruning.width.stage import PruneWidth
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import build_bundle
from pocketvlm.recipes.load import load_recipe

CONTEXT = RunContext(threads=1)
STAGES = {
    "depth": PruneDepth(decoder_blocks=1, tower_blocks=1),
    "width": PruneWidth(ffn_ratio=0.25, tower_ffn_ratio=0.25, kv_groups=1, compensate="none"),
}


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((96, 80))
        for _ in range(4)
    ]
    return tuple(
        Sample(image=picture, question="what is it?", answer="yes", kind="any")
        for picture in pictures
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_a_pruned_model_passes_its_certificate(tiny_paths, samples, tmp_path, family, stage):
    before = Checkpoint.load(tiny_paths[family])
    calibration = CalibrationSet(samples=samples, name="pictures")
    checkpoint = STAGES[stage].apply(before, calibration, CONTEXT)
    decoder = checkpoint.spec.decoder
    assert (decoder.depth, decoder.kv_heads) != (
        before.spec.decoder.depth,
        before.spec.decoder.kv_heads,
    )
    recipe = load_recipe("int8-safe")
    built = build_bundle(checkpoint, recipe, (ToOnnx(),), tmp_path / "b", samples, CONTEXT)
    cache = built.bundle.manifest.kv_cache
    assert (cache.layers, cache.kv_heads, cache.head_dim) == (
        decoder.depth,
        decoder.kv_heads,
        decoder.head_dim,
    )
    built.parity.raise_if_failed()


@pytest.mark.parametrize("stage", STAGES)
def test_the_placeholder_keeps_the_spelling_of_the_tokenizer(tiny_paths, samples, stage):
    before = Checkpoint.load(tiny_paths["smolvlm"])
    spelled = before.spec.image_token, before.spec.image_prefix, before.spec.image_suffix
    calibration = CalibrationSet(samples=samples, name="pictures")
    after = STAGES[stage].apply(before, calibration, CONTEXT).spec
    assert (after.image_token, after.image_prefix, after.image_suffix) == spelled
