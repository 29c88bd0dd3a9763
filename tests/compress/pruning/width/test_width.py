"""The stage `prune_width`: widths, repairs along the walk, what it refuses and what comes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, read_config, read_spec
from pocketvlm.compress.pruning.width.channels import Widths, unit_groups
from pocketvlm.compress.pruning.width.flap import Flap
from pocketvlm.compress.pruning.width.stage import PruneWidth
from pocketvlm.compress.pruning.width.taylor import Taylor
from pocketvlm.compress.pruning.width.unit_scores import UnitMagnitude
from pocketvlm.compress.pruning.width.widths import choose_widths, decoder_share, narrow_channels
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference.shapes import load_shape
from pocketvlm.stages import PlanState
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from tests.compress.quantization.functions import logits_of, relative_error, stored_bytes_of
from tests.export.rig import Decoder, make_prompt, open_session

CONTEXT = RunContext(threads=1)
IMPORTANCES = (Flap(), Taylor(), UnitMagnitude())
ALL = PruneWidth(ffn_ratio=0.3, kv_groups=1, tower_ffn_ratio=0.3)


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    return CalibrationSet.from_reference(0, 4)


def silence(checkpoint: Checkpoint, *, reader: bool) -> None:
    """Kills units everywhere: they give nothing, or in the tower always the same.

    Args:
        checkpoint: The model.
        reader: Whether the columns that read them die too.
    """
    generator = torch.Generator().manual_seed(0)
    for kind, count in (("kv_groups", 1), ("ffn", 40), ("tower_ffn", 50)):
        for group in unit_groups(checkpoint.spec, kind):
            dead = torch.randperm(group.count, generator=generator)[count:]
            for name in group.rows:
                values = checkpoint.form(name).dequantize()
                values[group.rows_of(name, dead)] = 0.0
                checkpoint.set_form(name, DenseWeight(values=values))
            if reader:
                values = checkpoint.form(group.last).dequantize()
                values[:, group.columns_of(dead)] = 0.0
                checkpoint.set_form(group.last, DenseWeight(values=values))


@pytest.mark.parametrize("importance", IMPORTANCES, ids=lambda one: one.kind)
@pytest.mark.parametrize("compensate", ["bias", "regression"])
def test_removing_what_is_dead_changes_nothing(
    tiny_checkpoint: Checkpoint, samples: CalibrationSet, importance, compensate: str
):
    # Magnitude cannot see that a column reads nothing.
    silence(tiny_checkpoint, reader=importance.kind == "magnitude")
    expected = logits_of(tiny_checkpoint)
    stage = replace(ALL, importance=importance, compensate=compensate)
    pruned = stage.apply(tiny_checkpoint, samples, CONTEXT)
    assert Widths.of(pruned.spec) == Widths(ffn=64, kv_groups=1, tower_ffn=64)
    # A unit of the tower with a bias is a constant, which only the repair can make up for.
    assert relative_error(logits_of(pruned), expected) < 2e-3
    for row in pruned.history[-1].layers:
        if "loss" in row:
            assert row["loss"] < 1e-6
            assert row["importance_removed"] < 1e-9 or row["part"] == "tower"


@pytest.mark.parametrize("importance", IMPORTANCES, ids=lambda one: one.kind)
def test_the_result_is_the_planned_model(
    tiny_checkpoint: Checkpoint, samples: CalibrationSet, importance
):
    stage = replace(ALL, importance=importance)
    planned = stage.spec_after(tiny_checkpoint.spec)
    pruned = stage.apply(tiny_checkpoint, samples, CONTEXT)
    assert pruned.spec == planned == read_spec(pruned.config)
    assert planned.decoder.has_output_bias
    assert planned.decoder.has_mlp_bias
    assert planned.decoder.heads % planned.decoder.kv_heads == 0
    (record,) = pruned.history
    assert record.metrics["widths"] == {"ffn": 64, "kv_groups": 1, "tower_ffn": 64}
    assert len(record.layers) == 2 + 2 + 3
    for row in record.layers:
        assert row["kept"] < row["units"]
        if "loss" in row:
            assert 0 <= row["importance_removed"] <= 0.6
            assert row["loss"] < row["loss_uncompensated"]
            assert row["judged_on"] == "held-out tokens"
    # LLaVA's last block is never run, but a stock class has one width for all.
    idle = [row for row in record.layers if "never run" in row["reason"]]
    assert len(idle) == (planned.family == "llava")


def test_repairs_help_in_order(tiny_path: Path, samples: CalibrationSet):
    before = logits_of(Checkpoint.load(tiny_path))
    errors = []
    for how in ("none", "bias", "regression"):
        stage = PruneWidth(ffn_ratio=0.3, tower_ffn_ratio=0.3, compensate=how)
        pruned = stage.apply(Checkpoint.load(tiny_path), samples, CONTEXT)
        losses = [row["loss"] for row in pruned.history[-1].layers if "loss" in row]
        errors.append((sum(losses), relative_error(logits_of(pruned), before)))
        assert pruned.spec.decoder.has_mlp_bias == (how != "none")
    assert errors[0][0] > errors[1][0] > errors[2][0]
    assert errors[0][1] > errors[2][1]


def test_without_biases_the_stock_config_stays_without(
    tiny_checkpoint: Checkpoint, samples: CalibrationSet
):
    stage = replace(ALL, biases=False)
    pruned = stage.apply(tiny_checkpoint, samples, CONTEXT)
    assert pruned.spec == stage.spec_after(pruned.spec) or not pruned.spec.decoder.has_mlp_bias
    assert not pruned.spec.decoder.has_output_bias
    for row in pruned.history[-1].layers:
        if row["part"] == "decoder":
            assert row["loss"] < row["loss_uncompensated"]
    state = PlanState.of(tiny_checkpoint.spec)
    assert not stage.plan(state).notes
    assert "not made up for" in replace(stage, compensate="bias").plan(state).notes[0]


def test_the_same_run_ends_in_the_same_bytes(tiny_path: Path, samples: CalibrationSet):
    stage = replace(ALL, importance=Taylor(order="mix"))
    first, second = (
        stored_bytes_of(stage.apply(Checkpoint.load(tiny_path), samples, CONTEXT)) for _ in range(2)
    )
    assert first == second


def test_onnx_carries_the_biases_at_the_predicted_size(
    tiny_checkpoint: Checkpoint, samples: CalibrationSet, tmp_path: Path
):
    stage = replace(ALL, compensate="bias")
    planned = stage.spec_after(tiny_checkpoint.spec)
    pruned = stage.apply(tiny_checkpoint, samples, CONTEXT)
    ToOnnx().export(pruned, tmp_path, CONTEXT)
    written = sum(file.stat().st_size for file in (tmp_path / "onnx").iterdir())
    predicted = ToOnnx().predict(planned, dict.fromkeys(planned.linears()))
    assert sum(predicted.part_bytes.values()) == pytest.approx(written, rel=0.03)
    pixels, visual, prompt = make_prompt(pruned)
    embeds, _ = open_session(tmp_path, "vision").run(None, {"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(embeds, visual.embeds, rtol=1e-3, atol=1e-4)
    found = Decoder(tmp_path, pruned.spec)(prompt.embeds.numpy(), prompt.positions.numpy())
    np.testing.assert_allclose(found, logits_of(pruned)[0, -1], rtol=1e-3, atol=1e-4)


@given(count=st.integers(64, 5000), ratio=st.floats(0, 0.95), multiple=st.sampled_from([32, 64]))
@settings(max_examples=200, deadline=None)
def test_channels_that_are_left(count: int, ratio: float, multiple: int):
    try:
        left = narrow_channels(count, ratio, multiple, "ffn_ratio")
    except RecipeError:
        assert count * (1 - ratio) < multiple + 1e-6
        return
    if ratio == 0:
        assert left == count
        return
    assert left % multiple == 0
    assert left <= count * (1 - ratio) + 1e-6 < left + multiple + 2e-6


@pytest.fixture(scope="module")
def specs(tiny_paths: dict[str, Path]) -> dict[str, ModelSpec]:
    tiny = read_spec(read_config(tiny_paths["smolvlm"]))
    return {"tiny": tiny, "smolvlm-256m": load_shape("smolvlm-256m").spec}


@given(share=st.floats(0.01, 0.59), name=st.sampled_from(["smolvlm-256m", "tiny"]))
@settings(max_examples=60, deadline=None)
def test_a_share_of_the_decoder_is_at_least_removed(specs, share: float, name: str):
    spec = specs[name]
    widths = choose_widths(
        spec,
        decoder_parameters=share,
        ffn_ratio=0.0,
        kv_groups=None,
        tower_ffn_ratio=0.0,
        multiple_of=32,
    )
    removed = decoder_share(spec, widths, with_tables=False)
    decoder = spec.decoder
    one_step = 32 * 3 * decoder.hidden_size * decoder.depth
    if widths.ffn == decoder.ffn_size:
        one_step = 2 * (decoder.heads + decoder.kv_heads) * decoder.head_dim * decoder.hidden_size
        one_step = one_step // decoder.kv_heads * decoder.depth
    whole = sum(x.out_features * x.in_features for x in spec.linears() if x.part == "decoder")
    assert share - 1e-9 <= removed <= share + one_step / whole
    # Attention gives something only where the FFN alone could not.
    alone = replace(widths, kv_groups=spec.decoder.kv_heads, ffn=32)
    if widths.kv_groups < spec.decoder.kv_heads:
        assert decoder_share(spec, alone, with_tables=False) < share
    tables = sum(
        x.out_features * x.in_features for x in spec.linears() if x.part in ("embedding", "head")
    )
    expected = removed * whole / (whole + tables)
    assert decoder_share(spec, widths, with_tables=True) == pytest.approx(expected)


def test_a_quarter_of_the_published_shape():
    spec = read_spec(load_shape("smolvlm-256m").config)
    widths = PruneWidth(decoder_parameters=0.25).widths(spec)
    assert widths == Widths(ffn=1024, kv_groups=3, tower_ffn=3072)
    widths = PruneWidth(decoder_parameters=0.25, kv_groups=2).widths(spec)
    assert widths == Widths(ffn=1184, kv_groups=2, tower_ffn=3072)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing would be removed"),
        ({"ffn_ratio": 1.0}, "ffn_ratio must be at least 0 and below 1, not 1.0"),
        ({"ffn_ratio": -0.1}, "ffn_ratio must be at least 0"),
        ({"tower_ffn_ratio": float("nan")}, "tower_ffn_ratio must be at least 0"),
        ({"decoder_parameters": 1.5}, "decoder_parameters must be at least 0"),
        ({"decoder_parameters": 0.2, "ffn_ratio": 0.2}, "both say how wide the FFN becomes"),
        ({"ffn_ratio": 0.2, "multiple_of": 48}, "multiple_of must be 32 or 64, not 48"),
        ({"ffn_ratio": 0.2, "compensate": "lora"}, "allowed are none, bias, regression"),
        ({"ffn_ratio": 0.2, "damping": 2.0}, "damping must lie between 0 and 1"),
        ({"ffn_ratio": 0.2, "held_out": 0.9}, "held_out must lie between 0 and 0.5"),
        ({"ffn_ratio": 0.2, "tower_tokens": 0}, "tower_tokens must be at least 1"),
        ({"ffn_ratio": 0.2, "modality_weights": "loud"}, "modality_weights 'loud' is unknown"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_values_that_make_no_sense(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PruneWidth(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn_ratio": 0.9}, "ffn_ratio: 0.9 of 96 channels leaves .* at most 0.667"),
        ({"tower_ffn_ratio": 0.8, "multiple_of": 64}, "tower_ffn_ratio: .* at most 0.333"),
        ({"kv_groups": 3}, "kv_groups: 3 cannot be kept of 2; allowed are 1 to 2"),
        ({"kv_groups": 0}, "kv_groups: 0 cannot be kept of 2"),
        ({"decoder_parameters": 0.9}, "with 1 KV groups .* at most 0.600"),
        ({"decoder_parameters": 0.5, "kv_groups": 2}, "with 2 KV groups .* at most 0.400"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_widths_that_a_model_cannot_have(tiny_path: Path, options: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        PruneWidth(**options).spec_after(read_spec(read_config(tiny_path)))


def test_a_quantized_weight_is_refused(tiny_checkpoint: Checkpoint, samples: CalibrationSet):
    linear = tiny_checkpoint.spec.linears()[0]
    form = AffineWeight.from_codes(
        torch.zeros(linear.out_features, linear.in_features),
        torch.ones(linear.out_features, linear.in_features // 32).half(),
        None,
        bits=4,
        group_size=32,
        in_features=linear.in_features,
    )
    tiny_checkpoint.set_form(linear.name, form)
    with pytest.raises(RecipeError, match="prune_width: .* comes before every mask"):
        ALL.apply(tiny_checkpoint, samples, CONTEXT)
