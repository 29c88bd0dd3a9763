"""Where visual tokens end, how that is found, and everything that has to follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketvlm.bundle import VisualSchedule
from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.gradients.visual_use import (
    LayerUse,
    attention_ratios,
    measure_visual_use,
)
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.kv_cache import QuantizeCache
from pocketvlm.compress.tokens.baseline.uniform_stride import UniformStride
from pocketvlm.compress.tokens.schedule.exit import Exit, InactiveGroups, LowDivergence
from pocketvlm.compress.tokens.schedule.stage import DropTokens
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.pipeline.plan import plan
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference_graph.decoder_rows import DecoderRows
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.reference_graph.sublayers import decoder_sublayers


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    return CalibrationSet.from_reference(0, 6)


@pytest.fixture
def ctx() -> RunContext:
    return RunContext(threads=1)


def uses(divergences: list[float], ratios: list[list[list[float]]] | None = None) -> list[LayerUse]:
    """Layers with the given divergences, the last one without; ratios [layer][sample][group]."""
    found = [*divergences, None]
    given = ratios or [[[1.0]]] * len(found)
    return [
        LayerUse(ratios=torch.tensor(ratio, dtype=torch.float64), divergence=divergence)
        for ratio, divergence in zip(given, found, strict=True)
    ]


@pytest.mark.parametrize(
    ("given", "layers"), [({}, 2), ({"first_layers": 0.3}, 1), ({"first_layers": 3}, 3)]
)
def test_a_share_or_a_count_says_where_visual_tokens_end(
    deep_checkpoint: Checkpoint, samples: CalibrationSet, ctx: RunContext, given: Any, layers: int
) -> None:
    done = DropTokens(schedule=Exit(**given)).apply(deep_checkpoint, samples, ctx)
    assert done.visual_schedule == VisualSchedule.ending(layers)
    record = done.history[-1]
    assert record.calibration_sha256 is None
    decoder = done.spec.decoder
    tile = 2 * 4 * decoder.kv_heads * decoder.head_dim * done.spec.visual_tokens
    assert record.metrics["cache_bytes_per_tile"] == layers * tile
    assert record.metrics["cache_bytes_per_tile_before"] == 4 * tile
    with pytest.raises(RecipeError, match="a checkpoint gets one schedule"):
        DropTokens().apply(done, samples, ctx)


@pytest.mark.parametrize("first_layers", [4, 9, 0.95])
def test_at_least_one_layer_must_be_skipped(
    deep_checkpoint: Checkpoint, samples: CalibrationSet, ctx: RunContext, first_layers: float
) -> None:
    with pytest.raises(RecipeError, match=r"drop_tokens: .* after \d layers; allowed are 1 to 3"):
        DropTokens(schedule=Exit(first_layers=first_layers)).apply(deep_checkpoint, samples, ctx)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exit(first_layers=0), "allowed are 1 and more layers"),
        (lambda: Exit(first_layers=1.0), "allowed are a share in"),
        (lambda: Exit(first_layers=True), "allowed are a share in"),
        (lambda: Exit(first_layers=2, rule=LowDivergence()), "both given"),
        (lambda: LowDivergence(limit=float("nan")), "limit is nan"),
        (lambda: InactiveGroups(ratio=0.0), "ratio is 0.0"),
        (lambda: InactiveGroups(share=1.0), "share is 1.0"),
    ],
)
def test_values_that_mean_nothing(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_fewest_layers_whose_answers_stay_close() -> None:
    assert LowDivergence(limit=0.1).choose(uses([3.0, 0.1, 0.2, 0.0])) == 2
    with pytest.raises(RecipeError, match=r"0.2 nats at the least.* rule.limit is 0.1"):
        LowDivergence(limit=0.1).choose(uses([3.0, 0.2]))


def test_layers_are_skipped_from_the_end_while_every_group_is_inactive() -> None:
    reads, rests = [1.0, 1.0], [0.01, 0.02]
    rule = InactiveGroups(ratio=0.1, share=0.4)

    def layers(*ratios: list[list[float]]) -> list[LayerUse]:
        return uses([0.0] * (len(ratios) - 1), list(ratios))

    quiet, loud, half = [rests, rests], [reads, reads], [rests, [0.01, 1.0]]
    assert rule.choose(layers(loud, loud, loud, quiet, quiet)) == 3
    # A group that rests in half of the samples rests in more than 40 % of them.
    assert rule.choose(layers(loud, loud, loud, half, quiet)) == 3
    assert InactiveGroups(share=0.5).choose(layers(loud, loud, loud, half, quiet)) == 4
    # One group of a layer that reads keeps the layer; what lies before it does not matter.
    assert rule.choose(layers(loud, loud, quiet, [[0.01, 1.0]] * 2, quiet)) == 4
    # The first two layers stay, as published.
    assert rule.choose(layers(quiet, quiet, quiet)) == 2
    with pytest.raises(RecipeError, match="the last layer has KV groups"):
        rule.choose(layers(quiet, quiet, loud))


@torch.no_grad()
def test_attention_ratios_are_those_of_a_plain_softmax(
    deep_checkpoint: Checkpoint, samples: CalibrationSet
) -> None:
    spec, model = deep_checkpoint.spec, deep_checkpoint.model
    prompt = encode_samples(deep_checkpoint.processor, samples)[0]
    pixels = deep_checkpoint.processor.pixels([samples.samples[0].open_image()])
    visual = encode_images(deep_checkpoint, pixels)
    inputs = embed_prompts(deep_checkpoint, torch.tensor([prompt.token_ids]), visual)
    rows = DecoderRows.at(spec.decoder, inputs.positions)
    angles = rows.angles[spec.decoder.rope]
    attention = decoder_sublayers(model, spec, 0)[0]
    normed = attention.norm(inputs.embeds)
    found = attention_ratios(deep_checkpoint, 0, normed, rows, inputs.is_visual)
    heads, width = spec.decoder.heads, spec.decoder.head_dim
    normed = attention.norm(inputs.embeds)[0].double()

    def rotated(role: str, head: int) -> torch.Tensor:
        weight = deep_checkpoint.form(f"{spec.decoder.stack}.0.self_attn.{role}")
        states = normed @ weight.dequantize().double().T[:, head * width : (head + 1) * width]
        turned = torch.cat([-states[:, width // 2 :], states[:, : width // 2]], dim=-1)
        return states * angles[0][0].double() + turned * angles[1][0].double()

    flags = inputs.is_visual[0].tolist()
    per_group = heads // spec.decoder.kv_heads
    for group in range(spec.decoder.kv_heads):
        seen = {True: 0.0, False: 0.0}
        for head in range(group * per_group, (group + 1) * per_group):
            q, k = rotated("q_proj", head), rotated("k_proj", group)
            for row in range(flags.index(True), len(flags)):
                if flags[row]:
                    continue
                weights = (q[row] @ k[: row + 1].T / width**0.5).softmax(dim=-1)
                for column, weight in enumerate(weights.tolist()):
                    seen[flags[column]] += weight
        assert float(found[0, group]) == pytest.approx(seen[True] / seen[False], rel=1e-5)


@torch.no_grad()
def test_divergences_are_those_of_a_checkpoint_that_ends_there(
    deep_checkpoint: Checkpoint, samples: CalibrationSet
) -> None:
    reducer = ReduceTokens(keep=0.5, reducer=UniformStride()).build(deep_checkpoint.spec)
    checkpoint = replace(deep_checkpoint, reducer=reducer)
    found = measure_visual_use(checkpoint, samples)
    assert [use.divergence is None for use in found] == [False, False, False, True]
    prompts = encode_samples(checkpoint.processor, samples)

    def answers(layers: int | None) -> torch.Tensor:
        schedule = layers and VisualSchedule.ending(layers)
        subject, rows = replace(checkpoint, visual_schedule=schedule), []
        for sample, prompt in zip(samples, prompts, strict=True):
            pixels = subject.processor.pixels([sample.open_image()])
            ids = torch.tensor([prompt.token_ids])
            logits = decode_logits(
                subject, embed_prompts(subject, ids, encode_images(subject, pixels))
            )
            count = len(prompt.token_ids) - prompt.answer_start
            size = prompt.answer_end - prompt.answer_start
            start = logits.shape[1] - count - 1
            rows.append(logits[0, start : start + size].double().log_softmax(-1))
        return torch.cat(rows)

    whole = answers(None)
    for layer in range(3):
        other = answers(layer + 1)
        expected = float((whole.exp() * (whole - other)).sum(-1).mean())
        assert expected > 0
        assert found[layer].divergence == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert all(use.ratios.shape == (6, checkpoint.spec.decoder.kv_heads) for use in found)


def test_a_rule_is_applied_and_reported(
    deep_checkpoint: Checkpoint, samples: CalibrationSet, ctx: RunContext
) -> None:
    done = DropTokens(schedule=Exit(rule=LowDivergence(limit=1e3))).apply(
        deep_checkpoint, samples, ctx
    )
    assert done.visual_schedule == VisualSchedule.ending(1)
    record = done.history[-1]
    assert record.calibration_sha256 == samples.sha256
    assert [row["runs_visual"] for row in record.layers] == [True, False, False, False]
    groups = done.spec.decoder.kv_heads
    assert all(len(row["visual_ratio_by_group"]) == groups for row in record.layers)
    assert record.layers[-1]["divergence_if_last"] is None


def test_a_rule_needs_answers(deep_paths: dict[str, Path], ctx: RunContext) -> None:
    whole = CalibrationSet.from_reference(0, 2)
    silent = replace(whole, samples=tuple(replace(s, answer="") for s in whole.samples))
    with pytest.raises(CalibrationError, match="every sample needs one"):
        DropTokens(schedule=Exit(rule=LowDivergence())).apply(
            Checkpoint.load(deep_paths["llava"]), silent, ctx
        )


def test_what_follows_is_calibrated_on_the_rows_that_run(
    deep_checkpoint: Checkpoint, samples: CalibrationSet, ctx: RunContext, tmp_path: Path
) -> None:
    """GPTQ's errors in late layers differ from those of a walk that still sees visual rows."""
    path = tmp_path / "dense"
    deep_checkpoint.save(path)
    losses = {}
    for layers in (None, 1):
        checkpoint = Checkpoint.load(path)
        if layers is not None:
            checkpoint = DropTokens(schedule=Exit(first_layers=layers)).apply(
                checkpoint, samples, ctx
            )
        done = Gptq(rules=(WeightRule(bits=4, group_size=32),)).apply(checkpoint, samples, ctx)
        assert done.visual_schedule == (layers and VisualSchedule.ending(layers))
        losses[layers] = {row["name"]: row.get("loss") for row in done.history[-1].layers}
    changed = {name for name, loss in losses[1].items() if loss != losses[None][name]}
    blocks = deep_checkpoint.spec.decoder.stack
    assert f"{blocks}.3.mlp.down_proj" in changed
    assert not any("vision" in name for name in changed)
    rounded = QuantizeCache().apply(done, samples, ctx)
    assert rounded.cache_grid is not None
    rounded.save(tmp_path / "rounded")
    assert Checkpoint.load(tmp_path / "rounded").visual_schedule == VisualSchedule.ending(1)


def recipe(*stages: dict[str, Any], targets: tuple[str, ...] = ("onnx",)) -> Any:
    document = {
        "schema": 1,
        "name": "x",
        "stages": list(stages),
        "targets": [{"method": target} for target in targets],
    }
    return recipe_from_document(document, where="x")


def test_order_is_prune_reduce_skip_quantize() -> None:
    skip = {"method": "drop_tokens"}
    rtn = {"method": "rtn", "rules": [{"match": ".*", "bits": 8}]}
    prune = {"method": "prune", "score": {"kind": "wanda"}}
    recipe(prune, {"method": "reduce_tokens"}, skip, rtn)
    for late in (prune, {"method": "reduce_tokens"}):
        with pytest.raises(RecipeError, match="needs all_tokens"):
            recipe(skip, late)
    with pytest.raises(RecipeError, match="needs float_weights"):
        recipe(rtn, skip)
    with pytest.raises(RecipeError, match="cannot follow a stage that leaves ended_tokens"):
        recipe(skip, skip)


def test_plan_shortens_the_cache_and_refuses_other_targets(deep_path: Path) -> None:
    skip = {"method": "drop_tokens", "schedule": {"kind": "exit", "first_layers": 1}}
    whole, cut = plan(deep_path, recipe()), plan(deep_path, recipe(skip))
    row = 2 * 2 * 16 * 4
    assert whole.kv_cache_bytes - cut.kv_cache_bytes == 3 * whole.visual_tokens * row
    assert not cut.refused
    refused = plan(deep_path, recipe(skip, targets=("onnx", "executorch", "coreml"))).refused
    assert [reason.partition(":")[0] for reason in refused] == ["executorch", "coreml"]
    assert all("leave drop_tokens out" in reason for reason in refused)
    rule = {"method": "drop_tokens", "schedule": {"kind": "exit", "rule": {"kind": "inactive"}}}
    measured = plan(deep_path, recipe(rule))
    assert measured.kv_cache_bytes == whole.kv_cache_bytes
    assert any("found on calibration samples" in warning for warning in measured.warnings)
    with pytest.raises(RecipeError, match="allowed are 1 to 3"):
        plan(
            deep_path,
            recipe({"method": "drop_tokens", "schedule": {"kind": "exit", "first_layers": 4}}),
        )
