"""The stages as a whole: what is quantized, what is said of it, and what a killed run leaves."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise import hessian
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.grid import AffineScheme, min_max_grid
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest, round_to_nearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, CheckpointError, RecipeError
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight

ALL = (WeightRule(bits=4, group_size=16),)


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 8)


def stored(checkpoint):
    """Every byte of every weight matrix."""
    return {
        linear.name: {
            key: value.view(torch.uint8).numpy().tobytes()
            for key, value in form.to_tensors().items()
        }
        for linear, form in checkpoint.forms().items()
    }


def rows_of(checkpoint):
    return {row["name"]: row for row in checkpoint.history[-1].layers}


def test_rounding_quantizes_what_it_is_told_to(tiny_checkpoint, samples):
    dense = {linear: form.dequantize() for linear, form in tiny_checkpoint.forms().items()}
    rules = (
        WeightRule(part="projector", bits=None),
        WeightRule(part="decoder", blocks=(0,), bits=8, group_size=32, symmetric=True),
        WeightRule(part="decoder", bits=3, group_size=32),
    )
    done = RoundToNearest(rules=rules).apply(tiny_checkpoint, samples, RunContext())
    rows = rows_of(done)
    assert list(rows) == list(dict.fromkeys(rows))
    assert rows.keys() == {linear.name for linear in dense}
    for linear, form in done.forms().items():
        row = rows[linear.name]
        if linear.part != "decoder":
            assert isinstance(form, DenseWeight)
            assert row["method"] == "none"
            expected = "its rule keeps it" if linear.part == "projector" else "no rule matches it"
            assert row["reason"] == expected
            continue
        assert isinstance(form, AffineWeight)
        assert (form.bits, form.zeros is None) == ((8, True) if linear.block == 0 else (3, False))
        assert row["bits_per_weight"] == form.bits_per_weight
        expected, _ = round_to_nearest(
            DenseWeight(values=dense[linear]),
            scheme=AffineScheme(bits=form.bits, symmetric=form.zeros is None),
            group_size=32,
        )
        assert torch.equal(form.dequantize(), expected.dequantize())
    json.dumps(done.history[-1].layers)


def test_gptq_loses_less_on_held_out_tokens_than_rounding(tiny_checkpoint):
    done = Gptq(rules=(WeightRule(bits=3, group_size=32),)).apply(
        tiny_checkpoint, CalibrationSet.from_reference(0, 16), RunContext()
    )
    record = done.history[-1]
    fitted = [row for row in record.layers if row["method"] == "gptq"]
    spec = done.spec
    tables = 0 if spec.decoder.tied_head else 1
    assert len(fitted) == len(spec.linears()) - tables
    for row in fitted:
        assert row["loss"] < 0.6 * row["loss_rtn"], row["name"]
        assert row["judged_on"] == "held-out tokens"
        assert row["damping"] == 0.01
        assert row["tokens"] > 0
        assert row["bits_per_weight"] == pytest.approx(3 + (16 + 8) / 32, abs=0.3)
    if tables:
        table = rows_of(done)[spec.decoder.embedding]
        assert table["method"] == "rtn"
        assert "by itself" in table["reason"]
    else:
        assert "one weight" in rows_of(done)[spec.decoder.embedding]["reason"]
        assert done.form(spec.decoder.head) is done.form(spec.decoder.embedding)
    calibration = record.metrics["calibration"]
    assert calibration["visual_tokens"] == 16 * spec.visual_tokens
    assert calibration["visual_per_text_token"] > 0
    assert calibration["held_out_samples"] == 2
    assert record.calibration_sha256 == calibration["sha256"]
    json.dumps([record.layers, record.metrics, record.parameters], allow_nan=False)


def test_the_loss_that_is_reported_is_that_of_the_layer(tiny_checkpoint, samples):
    """Relative squared change of one layer's outputs on the held-out image, by a forward pass."""
    spec = tiny_checkpoint.spec
    name = spec.linears()[0].name
    before = tiny_checkpoint.form(name).dequantize()
    seen = []
    module = tiny_checkpoint.model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    from pocketvlm.reference_graph.forward import encode_images

    held_out = samples.samples[-1]
    encode_images(tiny_checkpoint, tiny_checkpoint.processor.pixels([held_out.open_image()]))
    handle.remove()
    done = Gptq(rules=(WeightRule(match=name.replace(".", r"\."), bits=3, group_size=16),)).apply(
        tiny_checkpoint, samples, RunContext()
    )
    X = seen[0].reshape(-1, before.shape[1]).double()
    change = (done.form(name).dequantize() - before).double()
    expected = (X @ change.T).square().sum() / (X @ before.double().T).square().sum()
    assert rows_of(done)[name]["loss"] == pytest.approx(float(expected), rel=1e-3)


def test_the_same_input_gives_the_same_bytes(tiny_path, samples):
    first, second = (
        Gptq(rules=ALL).apply(Checkpoint.load(tiny_path), samples, RunContext()) for _ in range(2)
    )
    assert stored(first) == stored(second)


class _Stop(Exception):  # noqa: N818  (a signal of the test, not an error)
    pass


@pytest.mark.parametrize("stage", [Gptq(rules=ALL), RoundToNearest(rules=ALL)])
def test_a_stopped_run_goes_on_where_it_was(tiny_path, samples, tmp_path, stage):
    whole = stage.apply(Checkpoint.load(tiny_path), samples, RunContext())
    total = len(whole.spec.linears())
    for stop_after in (1, 9, total - 1):

        def stop(progress, after=stop_after):
            if progress.done == after:
                raise _Stop

        scratch = RunContext(scratch_dir=tmp_path / "scratch", on_progress=stop)
        with pytest.raises(_Stop):
            stage.apply(Checkpoint.load(tiny_path), samples, scratch)
        assert len(list((tmp_path / "scratch").iterdir())) >= stop_after
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scratch").iterdir()}
    notes = []
    resumed = stage.apply(
        Checkpoint.load(tiny_path),
        samples,
        RunContext(scratch_dir=tmp_path / "scratch", on_progress=notes.append),
    )
    assert stored(resumed) == stored(whole)
    assert notes[-1].done == notes[-1].total == total
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scratch").iterdir()}
    assert {name: now[name] for name in kept} == kept
    strip = [{**row, "seconds": 0} for row in whole.history[-1].layers]
    assert [{**row, "seconds": 0} for row in resumed.history[-1].layers] == strip
    # Everything is there: nothing is calibrated again.
    again = stage.apply(
        Checkpoint.load(tiny_path), samples, RunContext(scratch_dir=tmp_path / "scratch")
    )
    assert stored(again) == stored(whole)


def test_a_damaged_layer_file_is_made_again(tiny_path, samples, tmp_path):
    ctx = RunContext(scratch_dir=tmp_path)
    whole = stored(Gptq(rules=ALL).apply(Checkpoint.load(tiny_path), samples, ctx))
    victims = sorted(tmp_path.iterdir())[:2]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(victims[1].read_bytes()[:40])
    assert stored(Gptq(rules=ALL).apply(Checkpoint.load(tiny_path), samples, ctx)) == whole


def test_where_rounding_is_better_it_is_kept_and_said(tiny_checkpoint, samples, monkeypatch):
    """Error feedback that was led astray: codes from a Hessian that is not the layer's."""
    real = hessian.factorize

    def astray(hessian, **options):
        return real(torch.flip(hessian, (0, 1)), **options)

    monkeypatch.setattr(hessian, "factorize", astray)
    dense = {linear.name: form for linear, form in tiny_checkpoint.forms().items()}
    done = Gptq(rules=ALL).apply(tiny_checkpoint, samples, RunContext())
    record = done.history[-1]
    fallen = [row for row in record.layers if "at least as good on held-out" in row["reason"]]
    assert len(fallen) > 5
    assert record.metrics["layers_rounded"] >= len(fallen)
    for row in fallen:
        assert row["method"] == "rtn"
        assert row["loss"] >= row["loss_rtn"]
        expected, error = round_to_nearest(
            dense[row["name"]], scheme=AffineScheme(bits=4), group_size=16
        )
        assert torch.equal(done.form(row["name"]).dequantize(), expected.dequantize())
        assert row["weight_error"] == pytest.approx(error, rel=1e-5)
        assert any(note.startswith(row["name"]) for note in record.notes)


def test_a_hessian_without_factor_is_rounded_and_said(tiny_checkpoint, samples, monkeypatch):
    monkeypatch.setattr(hessian, "factorize", lambda *_, **__: None)
    done = Gptq(rules=ALL).apply(tiny_checkpoint, samples, RunContext())
    assert all(row["method"] == "rtn" for row in done.history[-1].layers)
    assert sum("Cholesky" in note for note in done.history[-1].notes) > 10


def test_raised_damping_is_said(tiny_checkpoint, samples, monkeypatch):
    real = hessian.factorize

    def weaker(hessian, **options):
        values, vectors = torch.linalg.eigh(hessian.double())
        values[0] = -0.02 * hessian.diagonal().mean()
        return real((vectors * values) @ vectors.T, **options)

    monkeypatch.setattr(hessian, "factorize", weaker)
    done = Gptq(rules=ALL).apply(tiny_checkpoint, samples, RunContext())
    raised = [row for row in done.history[-1].layers if row.get("damping_raised")]
    assert raised
    assert all(row["damping"] == pytest.approx(0.1) for row in raised)
    assert any("damping was raised to 0.1" in note for note in done.history[-1].notes)


def test_wide_hessians_are_cut_at_group_borders(tiny_checkpoint, samples, monkeypatch):
    monkeypatch.setattr(hessian, "_WHOLE_WIDTH", 64)
    monkeypatch.setattr(hessian, "_BLOCK_WIDTH", 50)
    done = Gptq(rules=ALL).apply(tiny_checkpoint, samples, RunContext())
    wide = [row for row in done.history[-1].layers if row.get("hessian_blocks", 1) > 1]
    # 96 columns and more, in blocks of 48.
    assert {row["role"] for row in wide} >= {"fc2", "down_proj"}
    assert all(row["loss"] < row["loss_rtn"] for row in wide)
    assert any("diagonal blocks" in note for note in done.history[-1].notes)


@pytest.mark.parametrize("grid", ["min_max", "mse"])
@pytest.mark.parametrize("stage", [Gptq, RoundToNearest])
def test_a_row_may_have_one_scale(tiny_path, samples, stage, grid, monkeypatch):
    rule = WeightRule(bits=4, group_size=None)
    spec = Checkpoint.load(tiny_path).spec
    widths = {linear.name: linear.in_features for linear in spec.linears()}
    assert len(set(widths.values())) > 1

    def run(rules):
        done = stage(rules=rules, grid=grid).apply(
            Checkpoint.load(tiny_path), samples, RunContext()
        )
        for linear, form in done.forms().items():
            assert form.group_size == linear.in_features
            assert form.scales.shape == (linear.out_features, 1)
            assert rows_of(done)[linear.name]["group_size"] == linear.in_features
        return done

    by_width = tuple(
        WeightRule(match=re.escape(name), bits=4, group_size=width)
        for name, width in widths.items()
    )
    assert stored(run((rule,))) == stored(run(by_width))
    # Blocks of a Hessian share the row's scale too, and still gain by error feedback.
    monkeypatch.setattr(hessian, "_WHOLE_WIDTH", 64)
    monkeypatch.setattr(hessian, "_BLOCK_WIDTH", 40)
    wide = [row for row in run((rule,)).history[-1].layers if row.get("hessian_blocks", 1) > 1]
    assert bool(wide) == (stage is Gptq)
    assert all(row["loss"] < row["loss_rtn"] for row in wide if row["method"] == "gptq")
    assert sum(row["method"] == "gptq" for row in wide) >= len(wide) // 2


def test_layers_that_share_an_input_may_have_different_groups(tiny_checkpoint, samples):
    rules = (
        WeightRule(match=r".*\.q_proj", bits=4, group_size=16),
        WeightRule(match=r".*\.k_proj", bits=2, group_size=24, symmetric=True),
        WeightRule(match=r".*\.v_proj", bits=None),
        WeightRule(bits=8, group_size=64),
    )
    done = Gptq(rules=rules).apply(tiny_checkpoint, samples, RunContext())
    sizes = {
        row["role"]: (row["bits"], row["group_size"])
        for row in done.history[-1].layers
        if row["method"] != "none"
    }
    assert sizes["q_proj"] == (4, 16)
    assert sizes["k_proj"] == (2, 24)
    assert "v_proj" not in sizes
    assert sizes["fc2"] == (8, 64)


def test_synthetic_calibration_is_declared(tiny_checkpoint):
    done = Gptq(rules=(WeightRule(part="projector", bits=4),)).apply(
        tiny_checkpoint, CalibrationSet.synthetic(3), RunContext()
    )
    assert done.history[-1].metrics["calibration"]["is_synthetic"] is True
    assert "synthetic" in done.history[-1].notes[0]


def test_a_model_that_was_quantized_saves_and_loads(tiny_checkpoint, samples, tmp_path):
    done = Gptq(rules=ALL).apply(tiny_checkpoint, samples, RunContext())
    done.save(tmp_path / "checkpoint")
    again = Checkpoint.load(tmp_path / "checkpoint")
    assert stored(again) == stored(done)
    assert again.history[-1].metrics == done.history[-1].metrics


@pytest.mark.parametrize("stage", [Gptq, RoundToNearest])
def test_bad_rules_are_refused(stage, tiny_checkpoint, samples):
    for bits in (1, 5, 16, 0):
        with pytest.raises(ValueError, match=f"bits must be 2, 3, 4, 8, .*not {bits}"):
            stage(rules=(WeightRule(bits=bits),))
    with pytest.raises(
        ValueError, match="group_size must be at least 1, or null for a whole row, not 0"
    ):
        WeightRule(bits=4, group_size=0)
    with pytest.raises(ValueError, match="at least one rule"):
        stage(rules=())
    with pytest.raises(ValueError, match="part 'tail' is unknown"):
        WeightRule(part="tail", bits=4)
    with pytest.raises(RecipeError, match="group_size 65 does not fit .*allowed is 1 to 64"):
        stage(rules=(WeightRule(bits=4, group_size=65),)).apply(
            tiny_checkpoint, samples, RunContext()
        )
    with pytest.raises(RecipeError, match="matches none"):
        stage(rules=(WeightRule(match="nothing", bits=4),)).apply(
            tiny_checkpoint, samples, RunContext()
        )
    once = stage(rules=(WeightRule(part="projector", bits=8),)).apply(
        tiny_checkpoint, samples, RunContext()
    )
    with pytest.raises(RecipeError, match="is quantized already"):
        stage(rules=ALL).apply(once, samples, RunContext())
    # What the first pass left alone may still be quantized.
    stage(rules=(WeightRule(part="projector", bits=None), WeightRule(part="tower", bits=8))).apply(
        once, samples, RunContext()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -0.1}, "damping must lie between 0 and 1"),
        ({"order": "random"}, "order 'random' is unknown"),
        ({"grid": "best"}, "grid 'best' is unknown"),
        ({"held_out": 0.9}, "held_out must lie between"),
        ({"tower_tokens": 0}, "tower_tokens must be at least 1"),
        ({"modality_weights": "equal"}, "modality_weights 'equal' is unknown"),
        ({"modality_weights": -1.0}, "modality_weights must be at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Gptq(rules=ALL, **options)


def test_bad_data_changes_no_weight(tiny_checkpoint, samples):
    before = stored(tiny_checkpoint)
    text_only = Sample(image=None, question="?", answer="!", where="data.jsonl:1")
    bad = CalibrationSet(name="bad", samples=(text_only,))
    with pytest.raises(CalibrationError, match="has no image"):
        Gptq(rules=ALL).apply(tiny_checkpoint, bad, RunContext())
    assert stored(tiny_checkpoint) == before


def test_inputs_that_are_not_finite_name_their_layer(tiny_checkpoint, samples):
    block = f"{tiny_checkpoint.spec.tower.stack}.1"
    norm = tiny_checkpoint.model.get_submodule(f"{block}.layer_norm2")
    with torch.no_grad():
        norm.weight.fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"1\.mlp\.fc1: .*not finite"):
        Gptq(rules=ALL).apply(tiny_checkpoint, samples, RunContext())


def test_weights_beyond_float16_name_their_layer(tiny_checkpoint, samples):
    name = tiny_checkpoint.spec.linears()[0].name
    huge = tiny_checkpoint.form(name).dequantize() * 1e9
    tiny_checkpoint.set_form(name, DenseWeight(values=huge))
    for stage in (Gptq(rules=ALL), RoundToNearest(rules=ALL)):
        with pytest.raises(CheckpointError, match=f"{name}: .*no float16 scale"):
            stage.apply(tiny_checkpoint, samples, RunContext())


def test_modality_weights_change_the_decoder_alone(tiny_path, samples):
    heavy, light = (
        stored(
            Gptq(rules=ALL, modality_weights=weight).apply(
                Checkpoint.load(tiny_path), samples, RunContext()
            )
        )
        for weight in (20.0, 0.05)
    )
    spec = Checkpoint.load(tiny_path).spec
    changed = {name for name in heavy if heavy[name] != light[name]}
    parts = {linear.part for linear in spec.linears() if linear.name in changed}
    assert "decoder" in parts
    assert not parts & {"tower", "projector"}


def test_grids_are_the_ones_asked_for(tiny_path, samples):
    wide, narrow = (
        RoundToNearest(rules=(WeightRule(bits=2, group_size=32),), grid=grid).apply(
            Checkpoint.load(tiny_path), samples, RunContext()
        )
        for grid in ("min_max", "mse")
    )
    for name, row in rows_of(narrow).items():
        assert row["weight_error"] < rows_of(wide)[name]["weight_error"]
    form = wide.form(wide.spec.linears()[0].name)
    dense = Checkpoint.load(tiny_path).form(wide.spec.linears()[0].name).dequantize()
    grid = min_max_grid(dense.double().view(dense.shape[0], -1, 32), AffineScheme(bits=2))
    assert torch.equal(form.scales, grid.scale.half())


def test_stages_are_their_own_configuration():
    stage = Gptq(rules=ALL)
    assert replace(stage, damping=0.05) == Gptq(rules=ALL, damping=0.05)
    assert stage.method == "gptq"
    assert RoundToNearest(rules=ALL).method == "rtn"
    assert Gptq.provides == {"quantized_weights"}
