"""What is left when blocks are gone: a stock model that computes what ours does."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pocketvlm.bundle import VisualSchedule
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.depth.block_influence import BlockInfluence
from pocketvlm.compress.pruning.depth.blocks import Block, all_blocks, remove_blocks, spec_without
from pocketvlm.compress.pruning.depth.greedy_blocks import Greedy
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.compress.quantization.kv_cache import QuantizeCache
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.families.table import read_model_spec
from pocketvlm.pipeline.plan import plan
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference_graph.forward import (
    decode_logits,
    embed_prompts,
    encode_images,
    greedy_generate,
)
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.sparse import SparseWeight
from tests.compress.pruning.tall import DECODER, TOWER, silence, write_tall
from tests.compress.quantization.functions import logits_of

CONTEXT = RunContext(threads=1)

STOCK = """
import sys
import torch
from transformers import AutoModelForImageTextToText

for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    given = torch.load(f"{folder}/given.pt", weights_only=True)
    pixels = given["pixels"] if model.config.model_type == "llava" else given["pixels"][:, None]
    with torch.no_grad():
        logits = model(input_ids=given["ids"], pixel_values=pixels).logits
        tokens = model.generate(
            input_ids=given["ids"], pixel_values=pixels, attention_mask=given["ids"] * 0 + 1,
            do_sample=False, min_new_tokens=6, max_new_tokens=6, eos_token_id=None,
        )
    torch.save({"logits": logits, "tokens": tokens[:, given["ids"].shape[1]:]}, f"{folder}/got.pt")
assert "pocketvlm" not in sys.modules
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("tall")
    return {
        "llava": write_tall("llava", root / "llava"),
        "llava-from-front": write_tall("llava", root / "front", feature_layer=TOWER),
        "smolvlm": write_tall("smolvlm", root / "smolvlm"),
    }


@pytest.fixture(params=("llava", "llava-from-front", "smolvlm"))
def checkpoint(request, paths):
    return Checkpoint.load(paths[request.param])


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 3)


def prompt_of(spec):
    side = spec.tower.height
    pixels = torch.randn(
        1, spec.tower.channels, side, side, generator=torch.Generator().manual_seed(1)
    )
    ids = torch.tensor([[5, 6, *[spec.image_token_id] * spec.visual_tokens, 7, 8, 9]])
    return pixels, ids


def inputs_of(checkpoint):
    pixels, ids = prompt_of(checkpoint.spec)
    with torch.no_grad():
        return embed_prompts(checkpoint, ids, encode_images(checkpoint, pixels))


def test_the_stock_class_loads_the_result_without_this_package(paths, samples, tmp_path):
    expected = {}
    for name, path in paths.items():
        stage = PruneDepth(decoder_blocks=(1,), tower_blocks=(0, 2))
        pruned = stage.apply(Checkpoint.load(path), samples, CONTEXT)
        pruned.save(tmp_path / name)
        pixels, ids = prompt_of(pruned.spec)
        torch.save({"pixels": pixels, "ids": ids}, tmp_path / name / "given.pt")
        inputs = inputs_of(pruned)
        with torch.no_grad():
            logits = decode_logits(pruned, inputs)
        expected[name] = logits, greedy_generate(pruned, inputs, max_new_tokens=6)
    folders = [str(tmp_path / name) for name in paths]
    subprocess.run([sys.executable, "-c", STOCK, *folders], check=True, cwd=tmp_path, timeout=300)
    for name, (logits, tokens) in expected.items():
        got = torch.load(tmp_path / name / "got.pt", weights_only=True)
        assert torch.equal(got["logits"], logits), name
        assert got["tokens"].tolist() == tokens


def test_a_saved_result_is_the_same_model_with_its_history(checkpoint, samples, tmp_path):
    pruned = PruneDepth(decoder_blocks=1, tower_blocks=1).apply(checkpoint, samples, CONTEXT)
    pruned.save(tmp_path / "saved")
    loaded = Checkpoint.load(tmp_path / "saved")
    assert loaded.spec == pruned.spec
    assert torch.equal(logits_of(loaded), logits_of(pruned))
    assert [dict(row) for row in loaded.history[-1].layers] == [
        dict(row) for row in pruned.history[-1].layers
    ]


def test_removing_a_block_that_does_nothing_changes_no_logit(checkpoint):
    before = logits_of(checkpoint)
    gone = [Block(stack="tower", index=2), Block(stack="decoder", index=1)]
    for block in gone:
        silence(checkpoint, block.name(checkpoint.spec))
    silent = logits_of(checkpoint)
    assert not torch.equal(silent, before)
    assert torch.equal(logits_of(remove_blocks(checkpoint, gone)), silent)


def test_the_cache_of_the_result_has_no_gap(checkpoint):
    pruned = remove_blocks(checkpoint, [Block(stack="decoder", index=0)])
    layers = pruned.model.get_submodule(pruned.spec.decoder.stack)
    names = [name for name, _ in layers.named_children()]
    assert names == [str(index) for index in range(DECODER - 1)]
    inputs = inputs_of(pruned)
    _, ids = prompt_of(pruned.spec)
    visual = encode_images(pruned, prompt_of(pruned.spec)[0])
    tokens = []
    for _ in range(5):
        with torch.no_grad():
            logits = decode_logits(pruned, embed_prompts(pruned, ids, visual))[0, -1]
        tokens.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([tokens[-1:]])], dim=1)
    assert greedy_generate(pruned, inputs, max_new_tokens=5) == [tokens]


def test_blocks_behind_the_feature_stay_and_the_index_points_at_the_same_feature(paths):
    for name, layer in (("llava", -2), ("llava-from-front", TOWER - 2)):
        checkpoint = Checkpoint.load(paths[name])
        behind = f"{checkpoint.spec.tower.stack}.{TOWER}"
        kept = checkpoint.form(f"{behind}.mlp.fc1")
        norm = checkpoint.vectors()[f"{behind}.layer_norm1.weight"]
        pruned = remove_blocks(checkpoint, [Block(stack="tower", index=i) for i in (0, 1)])
        assert pruned.config["vision_feature_layer"] == layer
        assert pruned.config["vision_config"]["num_hidden_layers"] == TOWER - 1
        moved = f"{pruned.spec.tower.stack}.{TOWER - 2}"
        assert pruned.form(f"{moved}.mlp.fc1") is kept
        assert torch.equal(pruned.vectors()[f"{moved}.layer_norm1.weight"], norm)


def test_every_weight_that_stays_is_the_same_object(checkpoint):
    before = checkpoint.forms()
    pruned = remove_blocks(checkpoint, [Block(stack="decoder", index=1)])
    blocks = checkpoint.spec.decoder.stack
    for linear, form in pruned.forms().items():
        name = linear.name
        for index in (2, 1):
            name = name.replace(f"{blocks}.{index}.", f"{blocks}.{index + 1}.")
        assert form is next(other for at, other in before.items() if at.name == name)


def test_the_planned_model_is_the_one_that_comes_out(checkpoint, samples):
    stage = PruneDepth(decoder_blocks=2, tower_blocks=(1,))
    planned = stage.spec_after(checkpoint.spec)
    pruned = stage.apply(checkpoint, samples, CONTEXT)
    assert pruned.spec == planned
    assert read_model_spec(pruned.config) == planned
    assert planned == spec_without(checkpoint.spec, {"decoder": 2, "tower": 1})
    metrics = pruned.history[-1].metrics
    assert metrics["weights"] == sum(
        linear.out_features * linear.in_features for linear in planned.linears()
    )
    assert (metrics["decoder_blocks"], metrics["tower_blocks"]) == (DECODER - 2, TOWER - 1)


def test_rows_tell_of_every_block(checkpoint, samples):
    before = all_blocks(checkpoint.spec)
    stage = PruneDepth(decoder_blocks=2, tower_blocks=(1,), importance=BlockInfluence())
    record = stage.apply(checkpoint, samples, CONTEXT).history[-1]
    assert [(row["part"], row["block"]) for row in record.layers] == [
        (block.stack, block.index) for block in before
    ]
    steps = {row["step"]: row for row in record.layers if row["removed"]}
    assert sorted(steps) == [1, 2, 3]
    assert (steps[1]["part"], steps[1]["block"], steps[1]["named"]) == ("tower", 1, True)
    assert steps[1]["influence"] is None
    others = [row for row in record.layers if row["part"] == "decoder" and not row["removed"]]
    assert not any(row["named"] for row in others)
    # The least go, the least of them first.
    assert steps[2]["influence"] <= steps[3]["influence"] <= min(r["influence"] for r in others)
    assert record.metrics["held_out_samples"] == 1
    assert record.metrics["held_out_loss_before"] > 0
    assert record.metrics["held_out_loss_after"] > 0


@pytest.mark.parametrize("importance", [Greedy(), BlockInfluence()])
def test_protected_blocks_are_never_chosen(checkpoint, samples, importance):
    stage = PruneDepth(decoder_blocks=2, importance=importance, keep_first=1, keep_last=1)
    record = stage.apply(checkpoint, samples, CONTEXT).history[-1]
    removed = [row["block"] for row in record.layers if row["removed"]]
    assert removed == [1, 2]


def test_named_blocks_go_whatever_they_are_worth_and_without_a_measurement(checkpoint, samples):
    seen = []
    ctx = RunContext(threads=1, on_progress=seen.append)
    stage = PruneDepth(decoder_blocks=(3, 0), held_out=0)
    record = stage.apply(checkpoint, samples, ctx).history[-1]
    assert [row["block"] for row in record.layers if row["removed"]] == [0, 3]
    assert seen == []
    assert "held_out_loss_before" not in record.metrics


def test_masked_weights_stay_masked(paths):
    checkpoint = Checkpoint.load(paths["llava"])
    name = "model.language_model.layers.3.mlp.up_proj"
    form = checkpoint.form(name)
    assert isinstance(form, DenseWeight)
    mask = torch.arange(form.values.numel()).view(form.shape) % 2 == 0
    checkpoint.set_form(name, SparseWeight.from_form(form, mask))
    pruned = remove_blocks(checkpoint, [Block(stack="decoder", index=0)])
    found = pruned.form("model.language_model.layers.2.mlp.up_proj")
    assert isinstance(found, SparseWeight)
    assert torch.equal(found.keeps(), mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "both 0"),
        ({"decoder_blocks": -1}, r"decoder_blocks is -1; allowed are a count of at least 0"),
        ({"decoder_blocks": True}, "decoder_blocks is True"),
        ({"tower_blocks": (1, -2)}, "tower_blocks holds -2"),
        ({"tower_blocks": (1, 1)}, "twice"),
        ({"decoder_blocks": 1, "keep_first": -1}, "keep_first is -1"),
        ({"decoder_blocks": 1, "keep_last": -1}, "keep_last is -1"),
        ({"decoder_blocks": 1, "held_out": 1.0}, "held_out is 1.0"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        PruneDepth(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_blocks": DECODER}, r"4 is more than 4 blocks have to give; allowed are 0 to 3"),
        ({"tower_blocks": 9}, r"tower_blocks: 9 is more than 3 .* allowed are 0 to 2"),
        ({"decoder_blocks": 3, "keep_first": 2}, r"with keep_first 2 .*allowed are 0 to 2"),
        ({"decoder_blocks": (0, 7)}, r"no block 7; allowed are 0 to 3"),
        ({"tower_blocks": (0, 1, 2)}, r"names all 3 blocks"),
    ],
)
def test_more_than_there_is_is_refused_before_any_compute(checkpoint, samples, options, message):
    stage = PruneDepth(**options)
    for attempt in (
        lambda: stage.spec_after(checkpoint.spec),
        lambda: stage.apply(checkpoint, samples, CONTEXT),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_it_comes_before_what_belongs_to_the_whole_model(paths, samples):
    for stage in (ReduceTokens(keep=2), QuantizeCache()):
        later = stage.apply(Checkpoint.load(paths["llava"]), samples, CONTEXT)
        with pytest.raises(RecipeError, match="move prune_depth before that stage"):
            PruneDepth(decoder_blocks=1).apply(later, samples, CONTEXT)
    later = replace(Checkpoint.load(paths["llava"]), visual_schedule=VisualSchedule.ending(2))
    with pytest.raises(RecipeError, match="drops visual tokens between layers"):
        PruneDepth(decoder_blocks=1).apply(later, samples, CONTEXT)
    stages = [{"method": "reduce_tokens"}, {"method": "prune_depth", "decoder_blocks": 1}]
    with pytest.raises(RecipeError, match=r"stages\.1 \(prune_depth\): needs all_tokens"):
        recipe_from_document({"schema": 1, "stages": stages, "targets": []}, where="test")


def test_removal_itself_refuses_nonsense(checkpoint):
    with pytest.raises(ValueError, match=r"the model has no .*\.7"):
        remove_blocks(checkpoint, [Block(stack="decoder", index=7)])
    with pytest.raises(ValueError, match="no block of the tower would be left"):
        remove_blocks(checkpoint, [Block(stack="tower", index=i) for i in range(TOWER)])


def document(**options):
    return {
        "schema": 1,
        "stages": [{"method": "prune_depth", **options}],
        "targets": [{"method": "onnx"}],
    }


def test_plan_counts_without_the_removed_and_tells_the_cost(paths):
    whole = plan(paths["llava"], recipe_from_document({**document(), "stages": []}, where="test"))
    recipe = recipe_from_document(document(decoder_blocks=2, tower_blocks=[0]), where="test")
    less = plan(paths["llava"], recipe)
    assert less.part_bytes["decoder"] == whole.part_bytes["decoder"] // 2
    assert less.part_bytes["tower"] == whole.part_bytes["tower"] * (TOWER - 1) // TOWER
    assert less.kv_cache_bytes == whole.kv_cache_bytes // 2
    assert any("every block that may still go in each of 2 steps" in w for w in less.warnings)
    cheap = recipe_from_document(document(decoder_blocks=[0, 1]), where="test")
    assert not any("prune_depth" in warning for warning in plan(paths["llava"], cheap).warnings)
    with pytest.raises(RecipeError, match="allowed are 0 to 3"):
        plan(paths["llava"], recipe_from_document(document(decoder_blocks=4), where="test"))
