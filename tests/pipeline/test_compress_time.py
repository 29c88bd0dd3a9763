"""The time that `plan` says stages take: its counts against what a walk does."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
import torch

from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.compress.layerwise.row_chunks import count_chunks, row_chunks
from pocketvlm.context import RunContext
from pocketvlm.pipeline.compress_time import measure, predict, rates
from pocketvlm.pipeline.compress_time.predict import predict_compress_time
from pocketvlm.pipeline.compress_time.rates import (
    CompressCalibration,
    CompressRates,
    RoundingRates,
    keep_compress_calibration,
    read_compress_calibration,
)
from pocketvlm.pipeline.plan import plan, plan_stages
from pocketvlm.pipeline.sources import load_checkpoint, resolve_calibration
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reference.shapes import load_shape
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.modules import FormLinear

SHAPE = load_shape("smolvlm-256m")
INT4 = load_recipe("int4-small")
ROUNDING = RoundingRates(column_us=50.0, weight_ns=100.0, feedback_macs_s=1e10)
RATES = CompressRates(
    threads=1,
    product_macs_s=4e10,
    attention_macs_s=3e10,
    moment_macs_s=5e10,
    factor_elements_s=2e7,
    factor_macs_s=5e10,
    widened_weights_s=2e8,
    rounding={"min_max": ROUNDING, "mse": replace(ROUNDING, weight_ns=400.0)},
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def keep(*measured: CompressRates) -> CompressCalibration:
    processor, cores, _ = rates.machine_identity()
    found = CompressCalibration(
        schema=rates.SCHEMA,
        processor=processor,
        cores=cores,
        torch=rates.torch_version(),
        measured_at="2026-01-01T00:00:00+00:00",
        rates=measured,
    )
    keep_compress_calibration(found)
    return found


def seconds(recipe=INT4, shape=SHAPE, *, samples=None) -> float:
    state = plan_stages(recipe.stages, shape.spec, recipe.targets)
    count = samples or recipe.calibration.samples
    return predict_compress_time(state, recipe.stages, samples=count).seconds["1"]


def test_a_plan_without_a_calibration_says_how_to_get_one():
    made = plan(SHAPE, INT4)
    assert made.compress_time.seconds == {}
    (line,) = [line for line in made.lines() if line.startswith("stages")]
    assert line.endswith("this machine is not calibrated; run pocketvlm bench --calibrate-host")


def test_a_plan_gives_hours_for_every_number_of_threads():
    kept = keep(RATES, replace(RATES, threads=2, product_macs_s=8e10))
    assert read_compress_calibration() == kept
    made = plan(SHAPE, INT4)
    one, two = [line for line in made.lines() if line.startswith("stages")]
    assert " h with 1 thread, " in one
    assert " h with 2 threads, " in two
    hours = made.compress_time.seconds["1"] / 3600
    assert f"{hours / made.compress_time.weights * 1e9:.2f} h a billion weights" in one
    assert made.compress_time.seconds["2"] < made.compress_time.seconds["1"]
    json.dumps(made.to_json())


def test_a_stage_of_which_nothing_was_measured_is_named():
    keep(RATES)
    made = plan(SHAPE, load_recipe("vq-2bit"))
    assert "nothing was measured of codebook" in "\n".join(made.lines())
    assert plan(SHAPE, load_recipe("float")).compress_time is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"processor": "another"}, "is of another processor (another, and now "),
        ({"torch": "1.0"}, "is of another version of torch (1.0, and now "),
        ({"schema": 0}, "schema 0, and this version reads "),
    ],
)
def test_a_calibration_of_something_else_does_not_hold(change, reason):
    keep_compress_calibration(replace(keep(RATES), **change))
    found = read_compress_calibration()
    assert reason in found
    assert found.endswith("run pocketvlm bench --calibrate-host")


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": "1"}', "nan"])
def test_a_damaged_calibration_is_a_reason_and_no_traceback(text):
    keep(RATES)
    rates.compress_calibration_path().write_text(text)
    assert "not a calibration of this version" in read_compress_calibration()


@pytest.mark.parametrize("name", [item.name for item in fields(CompressRates)][1:-1])
def test_time_rises_where_a_rate_falls(name):
    keep(RATES)
    before = seconds()
    keep(replace(RATES, **{name: getattr(RATES, name) / 2}))
    assert before < seconds() < 2 * before
    with pytest.raises(ValueError, match=f"{name} is 0; it must be above 0"):
        replace(RATES, **{name: 0.0})


def test_twice_the_samples_cost_more_and_no_second_factorization():
    keep(RATES)
    few, many = seconds(samples=64), seconds(samples=128)
    assert few < many < 2 * few
    slow = replace(RATES, factor_macs_s=1e6)
    keep(slow)
    assert seconds(samples=64) == pytest.approx(seconds(samples=128), rel=0.01)


def test_layers_that_stay_float_are_run_and_not_rounded():
    keep(RATES)
    every = seconds()
    rules = "[{part: tower, bits: null}, {match: '.*', bits: 4}]"
    assert seconds(load_recipe("int4-small", [f"stages.1.rules={rules}"])) < every


@pytest.mark.parametrize("shape", [(1, 1), (2048, 512), (2049, 512), (3, 2_000_000)])
def test_chunks_are_counted_as_they_are_made(shape):
    weight = DenseWeight(values=torch.zeros(shape))
    assert count_chunks(*shape) == sum(1 for _ in row_chunks(weight))


@pytest.mark.usefixtures("quick_compress_rates")
def test_what_is_measured_is_positive_and_kept():
    ctx = RunContext(on_progress=lambda *_: None)
    found = measure.calibrate_compress(2, ctx)
    assert read_compress_calibration() == found
    assert [one.threads for one in found.rates] == [1, 2]
    assert found.at(2) is found.rates[1]
    assert found.at(3) is None
    for one in found.rates:
        assert all(math.isfinite(value) and value > 0 for value in _numbers(one))


def test_three_layers_tell_columns_weights_and_feedback_apart():
    counts = [[c, r * c, r * c * c] for r, c in measure._LAYERS]
    true = [50e-6, 100e-9, 1e-10]
    times = [sum(a * b for a, b in zip(row, true, strict=True)) for row in counts]
    assert measure._solve(counts, times) == pytest.approx(true, rel=1e-6)
    for (rows, columns), took in zip(measure._LAYERS, times, strict=True):
        assert ROUNDING.seconds(rows, columns, chunks=1) == pytest.approx(took)


@pytest.mark.parametrize("counts", ["moments", "products"])
def test_the_walk_computes_as_often_as_it_is_counted(tiny_paths, monkeypatch, counts):
    """Moments, and products with weights, of a real run on a tiny model."""
    recipe = load_recipe("int4-small", ["calibration.samples=16"])
    checkpoint = load_checkpoint(tiny_paths["llava"])
    calibration = resolve_calibration(recipe.calibration, pictures=None)
    text = BlockWalk(checkpoint=checkpoint, samples=calibration).counts.text / 16
    monkeypatch.setattr(predict, "_TEXT_TOKENS", text)  # a token is a byte in the tiny model
    state = plan_stages(recipe.stages, checkpoint.spec, recipe.targets)
    rate = {"moments": "moment_macs_s", "products": "product_macs_s"}[counts]
    keep(replace(RATES, **{**dict.fromkeys(_RATES, 1e30), rate: 1.0, "rounding": _FREE}))
    predicted = predict_compress_time(state, recipe.stages, samples=16).seconds["1"]
    counted = dict.fromkeys(("moments", "products"), 0.0)
    add, forward = SecondMoment.add, FormLinear.forward

    def adding(self, inputs, weights=None):
        counted["moments"] += inputs.numel() * self.width
        add(self, inputs, weights)

    def multiplying(self, inputs):
        counted["products"] += inputs.numel() * self.form.shape[0]
        return forward(self, inputs)

    monkeypatch.setattr(SecondMoment, "add", adding)
    monkeypatch.setattr(FormLinear, "forward", multiplying)
    for stage in recipe.stages:
        checkpoint = stage.apply(checkpoint, calibration, RunContext())
    assert predicted == pytest.approx(counted[counts], rel=0.05)


_RATES = [item.name for item in fields(CompressRates)][1:-1]
_FREE = dict.fromkeys(
    ("min_max", "mse"), RoundingRates(column_us=0.0, weight_ns=0.0, feedback_macs_s=1e30)
)


def _numbers(found: CompressRates) -> list[float]:
    own = [getattr(found, name) for name in _RATES]
    return own + [one.feedback_macs_s for one in found.rounding.values()]
