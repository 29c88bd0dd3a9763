"""What stages make of towers with rotary positions and windows, and of positions on three axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.export.parity.metrics import relative_error
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.processor import user_message
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.stages import PlanState

CONTEXT = RunContext(threads=1)


@pytest.fixture(scope="module", params=["qwen2-vl", "qwen2.5-vl"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / request.param
    write_tiny_model(request.param, folder)
    return folder


@torch.inference_mode()
def logits(checkpoint: Checkpoint) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    processor = checkpoint.processor
    visual = encode_images(checkpoint, processor.pixels([Image.fromarray(noise)]))
    ids = torch.tensor([processor.encode([user_message("what is it?")])])
    return decode_logits(checkpoint, embed_prompts(checkpoint, ids, visual))[0].numpy()


def test_rotations_change_no_answer(path):
    before = logits(load_checkpoint(path))
    samples = CalibrationSet.synthetic(1)
    done = Rotate(untie_head=True).apply(load_checkpoint(path), samples, CONTEXT)
    assert done.history[-1].notes[0].startswith("the head became a separate matrix")
    turned = {row["name"] for row in done.history[-1].layers if row["method"] == "rotate"}
    assert {linear.name for linear in done.spec.linears() if linear.part == "tower"} <= turned
    assert relative_error(logits(done), before) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", "rules": [{"bits": 4, "group_size": 16}]},
        {"method": "codebook", "rules": [{"index_bits": 3, "vector_length": 2}], "rounds": 1},
        {"method": "prune", "score": {"kind": "wanda"}},
    ],
    ids=lambda options: options["method"],
)
def test_every_linear_is_compressed_as_planned_and_saved(path, tmp_path, options):
    document = {"schema": 1, "name": "one", "stages": [options]}
    (stage,) = recipe_from_document(document, where="one").stages
    source = load_checkpoint(path)
    planned = stage.plan(PlanState.of(source.spec))
    done = stage.apply(source, CalibrationSet.from_reference(0, 2), CONTEXT)
    found = {linear: form.layout for linear, form in done.forms().items()}
    # Which layers share codebooks is decided by what that costs.
    assert {linear: type(layout) for linear, layout in found.items()} == {
        linear: type(layout) for linear, layout in planned.layouts.items()
    }
    assert all(layout is not None for linear, layout in found.items() if linear.part == "tower")
    done.save(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.spec == done.spec
    np.testing.assert_array_equal(logits(again), logits(done))


def test_blocks_of_such_a_tower_are_not_removed(path):
    state = PlanState.of(load_checkpoint(path).spec)
    with pytest.raises(RecipeError, match="decoder_blocks alone is possible") as caught:
        PruneDepth(tower_blocks=1).plan(state)
    assert "\n" not in str(caught.value)
    assert PruneDepth(decoder_blocks=1).plan(state).spec.decoder.depth == 1
