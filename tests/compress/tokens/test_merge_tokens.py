"""Tokens merged inside the tower: definition, every target, walks, checkpoints, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.walk.partial_forward import PartialForward
from pocketvlm.calibration.walk.steps import FinishedSublayer, LinearGroup
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.rank.cls_ensemble import ClsEnsemble
from pocketvlm.compress.tokens.tower.mergers import (
    AnyMerger,
    MergeImportant,
    MergeNeighbours,
    MergeSimilar,
)
from pocketvlm.compress.tokens.tower.stage import MergeTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.export.executorch.layers import Kernels
from pocketvlm.export.executorch.methods import VisionMethod
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.torch_graphs import VisionGraph
from pocketvlm.models.spec import ModelSpec
from pocketvlm.models.token_merging import SimilarTokens
from pocketvlm.pipeline.plan import plan_stages
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.runtime.executorch.program import register_operators
from pocketvlm.stages import PlanState
from pocketvlm.weights.modules import FormEmbedding, FormLinear
from tests.calibration.walk.test_walk import direct_moments
from tests.export.coreml.rig import export, run_vision
from tests.export.rig import open_session
from tests.graph.test_token_merging import similar_by_loops

CTX = RunContext(threads=1)
STAGES = {
    "similar": MergeTokens(merger=MergeSimilar()),
    "spared": MergeTokens(merger=MergeSimilar(semantic_weight=0.5)),
    "neighbours": MergeTokens(merger=MergeNeighbours(), blocks=1, keep=0.25),
    "distinct": MergeTokens(merger=MergeImportant(), blocks=1),
    "attention": MergeTokens(merger=MergeImportant(score="attention"), first_block=1, blocks=1),
}


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> MergeTokens:
    return STAGES[request.param]


@pytest.fixture
def samples() -> CalibrationSet:
    return CalibrationSet.from_reference(0, 5)


def apply(stage: MergeTokens, checkpoint: Checkpoint) -> Checkpoint:
    return stage.apply(checkpoint, CalibrationSet.from_reference(0, 1), CTX)


def pictures(spec: ModelSpec, count: int = 2) -> Tensor:
    size = (spec.tower.height, spec.tower.width)
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def by_loops(path: Path, spec: ModelSpec, merges: Mapping[int, int], pixels: Tensor) -> Tensor:
    """Stock CLIP layers with ToMe's merging by lists of members, float64 [1, N, width]."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64).eval()
    tower, heads = spec.tower, spec.tower.heads
    embeddings = model.get_submodule(tower.embeddings)
    hidden = model.get_submodule(tower.pre_norm or "")(embeddings(pixels.double()))[0]
    members = [[token] for token in range(len(hidden))]
    for index in range(tower.feature_block + 1):
        layer = model.get_submodule(tower.blocks[index].module)
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        queries, keys, values = (
            linear(normed).view(len(hidden), heads, -1).transpose(0, 1)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        counts = torch.tensor([len(each) for each in members], dtype=torch.float64)
        weights = (queries @ keys.transpose(1, 2) / tower.head_dim**0.5).exp() * counts
        mixed = weights / weights.sum(dim=-1, keepdim=True) @ values
        hidden = hidden + attention.out_proj(mixed.transpose(0, 1).flatten(1))
        if index in merges:
            metric = keys.mean(dim=0)[1:].numpy()
            target = similar_by_loops(metric, merges[index], np.zeros(len(metric)))
            groups: list[list[int]] = [[] for _ in range(merges[index] + 1)]
            for token, place in enumerate([0, *(place + 1 for place in target)]):
                groups[place].append(token)
            means = [
                sum(hidden[token] * counts[token] for token in group)
                / sum(counts[token] for token in group)
                for group in groups
            ]
            members = [[each for token in group for each in members[token]] for group in groups]
            hidden = torch.stack(means)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    restored = torch.zeros(tower.tokens, tower.hidden_size, dtype=torch.float64)
    for state, group in zip(hidden, members, strict=True):
        restored[group] = state
    return model.model.multi_modal_projector(restored[None, 1:])


@torch.inference_mode()
def test_the_tower_is_stock_layers_with_members_in_lists(tiny_paths: Mapping[str, Path]) -> None:
    path = tiny_paths["llava"]
    checkpoint = apply(STAGES["similar"], Checkpoint.load(path))
    merges = {merge.block: merge.patches for merge in checkpoint.spec.tower.merges}
    assert merges == {0: 12, 1: 8}
    pixels = pictures(checkpoint.spec, 1)
    found = encode_images(checkpoint, pixels).embeds.double()
    expected = by_loops(path, checkpoint.spec, merges, pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    whole = encode_images(Checkpoint.load(path), pixels).embeds.double()
    assert float((found - whole).abs().max()) > 1e-2, "the merge changes something"


@torch.inference_mode()
def test_pictures_of_equal_patches_lose_nothing(tiny_checkpoint: Checkpoint) -> None:
    """Where a picture repeats itself but for positions, which are taken away here."""
    spec = tiny_checkpoint.spec
    table = tiny_checkpoint.model.get_submodule(spec.tower.position_embedding or "").weight
    table.copy_(table[-1:].expand_as(table))
    one = torch.randn(1, 3, spec.tower.patch_size, spec.tower.patch_size)
    pixels = one.repeat(1, 1, spec.tower.rows, spec.tower.columns)
    whole = encode_images(tiny_checkpoint, pixels).embeds
    for stage in STAGES.values():
        merged = encode_images(apply(stage, tiny_checkpoint), pixels).embeds
        torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_every_target_computes_what_torch_defines(
    stage: MergeTokens, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = apply(stage, tiny_checkpoint)
    spec, pixels = checkpoint.spec, pictures(checkpoint.spec, 1)
    expected = encode_images(checkpoint, pixels)
    assert expected.embeds.shape[1] == spec.visual_tokens, "tokens are restored"
    torch.testing.assert_close(VisionGraph(checkpoint)(pixels)[0], expected.embeds)

    ToOnnx().export(checkpoint, tmp_path, CTX)
    session = open_session(tmp_path, "vision")
    embeds, indices = session.run(None, {"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(embeds, expected.embeds.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(indices, expected.indices.numpy())

    register_operators()
    rows, _ = VisionMethod(Kernels(checkpoint.model), spec, None)(pixels)
    width = spec.decoder.hidden_size
    torch.testing.assert_close(rows[..., :width], expected.embeds, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_core_ml_computes_it_too(
    tiny_checkpoint: Checkpoint, tmp_path: Path, precision: str
) -> None:
    checkpoint = apply(STAGES["similar"], tiny_checkpoint)
    pixels = pictures(checkpoint.spec, 1)
    expected = encode_images(checkpoint, pixels).embeds.numpy()
    folder = export(checkpoint, tmp_path, precision=precision)
    found = run_vision(folder / "vision.mlpackage", pixels.numpy())["embeds"]
    bound = {"float32": 1e-4, "float16": 3e-2}[precision]
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()


def with_reducer(checkpoint: Checkpoint) -> Checkpoint:
    """With a reducer that reads blocks before and after the merges, where there is [CLS]."""
    spec = checkpoint.spec
    if not spec.tower.has_cls:
        return checkpoint
    reducer = ClsEnsemble(first_block=0).build(spec, keep=6, positions="original")
    return replace(checkpoint, reducer=reducer)


def test_a_walk_calibrates_on_the_tokens_that_run(
    tiny_checkpoint: Checkpoint, samples: CalibrationSet
) -> None:
    checkpoint = apply(STAGES["similar"], tiny_checkpoint)
    expected = direct_moments(checkpoint, samples, weights=1.0)
    for step in BlockWalk(checkpoint=checkpoint, samples=samples, held_out=0.0):
        assert isinstance(step, LinearGroup)
        for name in step.names if step.moments is not None else ():
            assert step.moments is not None
            (found,) = step.moments(None).calibration.blocks()
            torch.testing.assert_close(
                found.double(), expected[name], rtol=2e-4, atol=1e-5, msg=name
            )


def test_the_float_model_beside_a_walk_merges_the_same_tokens(
    tiny_checkpoint: Checkpoint, samples: CalibrationSet
) -> None:
    """As long as nothing is replaced, both are one."""
    checkpoint = with_reducer(apply(STAGES["similar"], tiny_checkpoint))
    walk = BlockWalk(checkpoint=checkpoint, samples=samples, held_out=0.0, carry_float=True)
    compared = 0
    for step in walk:
        if isinstance(step, FinishedSublayer):
            after = step.sublayer.run(step.inputs[0], step.rows_of(0))
            torch.testing.assert_close(after, step.targets[0])
            compared += 1
    spec = checkpoint.spec
    assert compared == 2 * (spec.tower.feature_block + 1 + spec.decoder.depth)


def test_a_partial_forward_merges_them_too(
    tiny_checkpoint: Checkpoint, samples: CalibrationSet
) -> None:
    checkpoint = with_reducer(apply(STAGES["similar"], tiny_checkpoint))
    prompts = encode_samples(checkpoint.processor, samples)
    found = PartialForward(checkpoint, samples).logits
    for sample, prompt, logits in zip(samples, prompts, found, strict=True):
        with torch.inference_mode():
            visual = encode_images(checkpoint, checkpoint.processor.pixels([sample.open_image()]))
            inputs = embed_prompts(checkpoint, torch.tensor([prompt.token_ids]), visual)
            every = decode_logits(checkpoint, inputs)[0]
        torch.testing.assert_close(
            logits, every[prompt.predicting(every.shape[0])], rtol=1e-4, atol=1e-4
        )


def test_a_saved_checkpoint_merges_again(
    stage: MergeTokens, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = apply(stage, tiny_checkpoint)
    checkpoint.save(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.spec == checkpoint.spec
    assert again.spec.tower.merges
    forms = {
        name: module.form
        for name, module in again.model.named_modules()
        if isinstance(module, FormLinear | FormEmbedding)
    }
    rebuilt = again.rebuild(again.config, forms, again.vectors())
    assert rebuilt.spec.tower.merges == checkpoint.spec.tower.merges


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": 16, "blocks": 1}, "16 of 16 patches are to remain; allowed are 1 to 15"),
        (
            {"keep": 7, "first_block": 1, "blocks": 1},
            "block 1: 7 of 16 patches are to remain; pairs .* at least 8 in one block",
        ),
        ({"first_block": 2, "blocks": 1}, "merged in blocks 2; allowed are .*, 0 to 1$"),
        ({"blocks": 3}, "merged in blocks 0, 1, 2; allowed are"),
        (
            {"merger": MergeNeighbours(), "keep": 6, "first_block": 0, "blocks": 1},
            "block 0: 6 of 16 patches are to remain; neighbours leaves 8 or 4 or 2 or 1, ",
        ),
        (
            {"merger": MergeNeighbours(), "first_block": 0, "blocks": 2, "keep": 4},
            "block 0: 10 of 16 patches are to remain; neighbours leaves .*, all in one block",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_by_a_plan(
    tiny_paths: Mapping[str, Path], options: dict[str, Any], reason: str
) -> None:
    spec = Checkpoint.load(tiny_paths["llava"]).spec
    with pytest.raises(RecipeError, match=reason) as caught:
        MergeTokens(**options).plan(PlanState.of(spec))
    assert str(caught.value).startswith("merge_tokens: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"keep": 1.0}, {"blocks": 0}, {"first_block": -1}]
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is "):
        MergeTokens(**options)


def test_towers_that_need_their_grid_say_so(tiny_paths: Mapping[str, Path]) -> None:
    spec = Checkpoint.load(tiny_paths["smolvlm"]).spec
    blocks = tuple(
        replace(block, attention=replace(block.attention, window=2)) for block in spec.tower.blocks
    )
    for tower, reason in (
        (replace(spec.tower, blocks=blocks), "attends within windows of its grid"),
        (replace(spec.tower, rope_theta=1e4), "turns queries and keys"),
        (replace(spec.tower, earlier_features=(0,)), "hands on features of earlier blocks"),
    ):
        with pytest.raises(RecipeError, match=f"merge_tokens: this tower {reason}"):
            MergeTokens().plan(PlanState.of(replace(spec, tower=tower)))


@pytest.mark.parametrize("later", ["merge_tokens", "prune_depth"])
def test_what_belongs_to_every_patch_comes_first(
    later: str, tiny_paths: Mapping[str, Path]
) -> None:
    from pocketvlm.compress.pruning.depth.stage import PruneDepth

    stages = {"merge_tokens": MergeTokens(), "prune_depth": PruneDepth(decoder_blocks=1)}
    spec = Checkpoint.load(tiny_paths["smolvlm"]).spec
    with pytest.raises(RecipeError, match="cannot follow a stage that leaves merged_tokens"):
        plan_stages((MergeTokens(), stages[later]), spec)


def test_blocks_share_what_is_merged(tiny_paths: Mapping[str, Path]) -> None:
    tower = Checkpoint.load(tiny_paths["smolvlm"]).spec.tower
    tower = replace(tower, height=512, width=512, patch_size=16, feature_block=11)
    merges = MergeTokens(keep=0.25, first_block=2, blocks=3).merges(tower)
    assert merges == tuple(
        SimilarTokens(block=block, patches=patches)
        for block, patches in ((2, 768), (3, 512), (4, 256))
    )
    merging = replace(tower, merges=merges)
    entering = [merging.tokens_entering(block) for block in (0, 2, 3, 4, 5, 11)]
    assert entering == [1024, 1024, 768, 512, 256, 256]


def test_rectangles_are_the_nearest_that_fit(tiny_paths: Mapping[str, Path]) -> None:
    tower = Checkpoint.load(tiny_paths["smolvlm"]).spec.tower
    rectangles: AnyMerger = MergeNeighbours()
    wide = replace(tower, height=512, width=512, patch_size=16)
    counts = [rectangles.nearest_count(wide, count) for count in (900, 512, 300, 100, 64)]
    assert counts == [512, 512, 256, 128, 64]
    odd = replace(tower, height=48, width=80, patch_size=16)
    assert rectangles.nearest_count(odd, 7) == 7
