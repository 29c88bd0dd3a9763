"""Tiles of one picture with different numbers of tokens: torch, runtimes and the app agree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.bundle import Bundle, TileBudget
from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError, InputError
from pocketvlm.evaluation.bundle_answers import answer_with_bundle, bundle_limits
from pocketvlm.evaluation.torch_answers import answer_with_checkpoint, checkpoint_limits
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.parity.certificate import ParityReport
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.pipeline.assemble import build_bundle, write_graphs
from pocketvlm.pipeline.plan import plan_stages
from pocketvlm.pipeline.plan_memory import predict_memory
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.prompt.messages import user_turn
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference.random_models import tiny_config, write_random_model
from pocketvlm.reference_graph.forward import encode_images
from pocketvlm.reference_graph.tile_budget import encode_tiles
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.engines import ENGINES
from pocketvlm.runtime.executorch.native_runner import prompt_parts
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.runtime.text import TextCodec
from pocketvlm.runtime.vision import VisionChoice, only_vision
from pocketvlm.stages import Target

CONTEXT = RunContext(threads=1)
ONNX = ToOnnx(accuracy_level=0, tower_accuracy_level=0)
COREML = ToCoreml(precision="float32", context=512)
BUDGETS = {
    "whole_finer": {"kind": "whole_finer", "whole": 8, "tile": 2},
    "detail": {"kind": "detail", "whole": 8, "tile": 4},
    "hired": {"kind": "hired", "whole": 8, "tile": 4},
}
CASES: list[tuple[str, str, Target]] = [
    ("smolvlm-tiles", "whole_finer", ONNX),
    ("llava-next", "hired", ONNX),
    ("smolvlm-tiles", "detail", COREML),
]


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Coarse noise to the left, nothing to the right."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    values[:, 3:] = 90
    return Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)


SAMPLES = tuple(
    Sample(image=picture(seed, *size), question=question, answer="yes", kind="any")
    for seed, (size, question) in enumerate((((96, 96), "what is it?"), ((120, 60), "is it red?")))
)


def stages_of(kind: str) -> list[dict[str, Any]]:
    return [
        {
            "method": "reduce_tokens",
            "reducer": {"kind": "distinct_features"},
            "keep": [5, 2, 8],
            "tile_budget": BUDGETS[kind],
        }
    ]


@dataclass(frozen=True)
class Built:
    kind: str
    source: Checkpoint
    checkpoint: Checkpoint
    target: Target
    bundle: Bundle
    parity: ParityReport | None

    @property
    def budget(self) -> TileBudget:
        assert self.checkpoint.tile_budget is not None
        return self.checkpoint.tile_budget

    def endless(self) -> Bundle:
        """The bundle with answers that nothing ends."""
        manifest = self.bundle.manifest
        generation = replace(manifest.generation, eos_token_ids=())
        return replace(self.bundle, manifest=replace(manifest, generation=generation))

    def talks(self) -> list[Conversation]:
        """Conversations by the target's engine and by torch."""
        bundle = self.endless()
        runners = ENGINES[self.target.method](bundle, 1, 0), TorchRunner(self.checkpoint)
        return [Conversation(bundle, runner=runner) for runner in runners]


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2].method}"
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    name, kind, target = request.param
    folder = tmp_path_factory.mktemp("budget")
    write_random_model(tiny_config(name), folder / "model", tiles_per_edge=2)
    recipe = recipe_from_document(
        {"schema": 1, "name": kind, "stages": stages_of(kind)}, where=kind
    )
    source = load_checkpoint(folder / "model")
    done = recipe.stages[0].apply(source, CalibrationSet(name="test", samples=SAMPLES), CONTEXT)
    place, parity = folder / "bundle", None
    if target is ONNX:
        parity = build_bundle(done, recipe, (target,), place, SAMPLES, CONTEXT).parity
    else:  # three graphs more to certify would take seconds, and show the same
        write_graphs(done, (target,), place, "", CONTEXT)
    return Built(kind, source, done, target, Bundle.open(place), parity)


def shown_tokens(built: Built, sample: Sample) -> list[int]:
    """Tokens of every tile that is seen, in torch."""
    processor = built.checkpoint.processor
    image = sample.open_image()
    grids = processor.grids([image])
    with torch.inference_mode():
        (tiles,) = encode_tiles(built.checkpoint, processor.pixels([image], grids), grids)
    return [tile.indices.shape[1] for tile in tiles]


def test_the_certificate_asks_with_the_budget_and_with_every_other_graph(built):
    assert built.bundle.manifest.tile_budget == built.budget
    if built.parity is not None:
        assert built.parity.failures() == []
        names = [variant.name for variant in built.bundle.manifest.variants]
        assert [found.variant for found in built.parity.targets] == [None, *names[1:]]


def test_tiles_differ_and_are_what_each_graph_alone_says(built):
    visions = {seen.visual_tokens: seen for seen in built.checkpoint.each_vision()}
    counts = [shown_tokens(built, sample) for sample in SAMPLES]
    assert all(len(set(own)) > 1 for own in counts)
    image = SAMPLES[0].open_image()
    processor = built.checkpoint.processor
    grids = processor.grids([image])
    assert counts[0][grids[0].seen.index(grids[0].whole)] == built.budget.whole
    with torch.inference_mode():
        pixels = processor.pixels([image], grids)
        (tiles,) = encode_tiles(built.checkpoint, pixels, grids)
        for place, tile in enumerate(tiles):
            alone = encode_images(visions[counts[0][place]], pixels[place : place + 1])
            assert torch.equal(tile.indices, alone.indices)
            torch.testing.assert_close(tile.embeds, alone.embeds, rtol=0, atol=1e-5)


def test_an_app_answers_as_torch_does_over_turns(built):
    talks = built.talks()
    answers = [talk.ask("what?", picture(5, 96, 96), max_new_tokens=8) for talk in talks]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].timings.visual_tokens == answers[1].timings.visual_tokens
    again = [talk.ask("and?", max_new_tokens=2) for talk in talks]
    assert again[0].token_ids == again[1].token_ids
    assert again[0].timings.vision_ms == 0
    # A turn that names a number of tokens has it for every tile.
    (grid,) = built.checkpoint.processor.grids([picture(7, 96, 96)])
    few = VisionChoice(visual_tokens=2)
    named = [talk.ask("so?", picture(7, 96, 96), vision=few, max_new_tokens=2) for talk in talks]
    assert named[0].token_ids == named[1].token_ids
    assert named[0].timings.visual_tokens <= grid.most_rows(16, 2)


def test_no_picture_takes_more_rows_than_plan_counts(built):
    recipe = recipe_from_document(
        {"schema": 1, "name": built.kind, "stages": stages_of(built.kind)}, where=built.kind
    )
    planned = plan_stages(recipe.stages, built.source.spec, (built.target,))
    assert planned.tile_budget == built.budget
    manifest, is_map = built.bundle.manifest, built.checkpoint.spec.line_break is not None
    for sample, talk in zip(SAMPLES, (built.talks()[0] for _ in SAMPLES), strict=True):
        (grid,) = sample.grids(built.checkpoint.processor)
        rows = talk.ask("what?", sample.open_image(), max_new_tokens=1).timings.visual_tokens
        assert (
            rows
            <= planned.most_rows(grid)
            == grid.most_rows(manifest.visual_tokens_full, *manifest.tile_tokens)
        )
        if not is_map:
            assert rows == sum(shown_tokens(built, sample))
        if built.kind == "whole_finer":
            assert rows == planned.most_rows(grid)


def test_scores_are_those_of_the_budget(built):
    answers = [
        answer_with_checkpoint(
            built.checkpoint, SAMPLES, batch_size=2, max_new_tokens=6, ctx=CONTEXT, task="torch"
        ),
        answer_with_bundle(
            built.bundle,
            SAMPLES,
            max_new_tokens=6,
            ctx=CONTEXT,
            task="bundle",
            runner=ENGINES[built.target.method](built.bundle, 1, 0),
        ),
    ]
    assert answers[0] == answers[1]
    limits = bundle_limits(built.bundle, TextCodec.from_bundle(built.bundle))
    own = checkpoint_limits(built.checkpoint)
    assert (limits.kept, limits.kept_of_whole) == (own.kept, own.kept_of_whole)
    assert limits.kept_of_whole == built.budget.whole


def test_a_bundle_of_one_of_its_graphs_has_no_budget(built):
    manifest = built.bundle.manifest
    assert only_vision(built.bundle, VisionChoice()).manifest == manifest
    few = only_vision(built.bundle, VisionChoice(visual_tokens=2)).manifest
    assert (few.tile_budget, few.visual_tokens) == (None, 2)
    with pytest.raises(InputError, match="no vision graph for 7 visual tokens; this bundle has 5"):
        only_vision(built.bundle, VisionChoice(visual_tokens=7))


@pytest.fixture
def one(built: Built) -> Built:
    if built.kind != "whole_finer":
        pytest.skip("said once")
    return built


def test_a_runner_keeps_the_graphs_that_the_budget_uses(one):
    loaded: list[str] = []

    class Counting(OnnxRunner):
        def _load(self, component):
            loaded.append(component.file)
            return super()._load(component)

    for keep, most in ((None, 2), (1, 4)):
        loaded.clear()
        talk = Conversation(one.bundle, runner=Counting(one.bundle, threads=1, keep_vision=keep))
        for _ in range(2):
            talk.reset()
            talk.ask("what?", SAMPLES[0].open_image(), max_new_tokens=1)
        assert len([file for file in loaded if "vision" in file]) == most
    with_budget = predict_memory(plan_of(one), (ONNX,))
    without = predict_memory(replace(plan_of(one), tile_budget=None), (ONNX,))
    assert with_budget.weight_bytes > without.weight_bytes


def plan_of(built: Built):
    recipe = recipe_from_document(
        {"schema": 1, "name": built.kind, "stages": stages_of(built.kind)}, where=built.kind
    )
    return plan_stages(recipe.stages, built.source.spec, (built.target,))


def test_what_cannot_follow_a_budget_says_so(one):
    codec = TextCodec.from_bundle(one.bundle)
    with pytest.raises(InputError, match="tiles of this bundle's pictures are seen by several"):
        prompt_parts(one.bundle, codec, user_turn("what?", 1), [SAMPLES[0].open_image()])
    document = one.bundle.manifest.to_json()
    document["tile_budget"]["whole"] = 11
    with pytest.raises(BundleError, match="gives a tile 11 visual tokens, and no vision graph"):
        type(one.bundle.manifest).from_json(document, one.bundle.path)
