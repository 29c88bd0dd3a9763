"""Times that a plan predicts, and what published figures say of such predictions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.device_bench.devices import list_devices, load_device
from pocketvlm.device_bench.devices import load as profiles
from pocketvlm.device_bench.devices.derive import load_reference
from pocketvlm.device_bench.prediction.calibration import host, host_file
from pocketvlm.device_bench.workload import PRESETS
from pocketvlm.models.images.tilings import SplitGrid
from pocketvlm.pipeline.plan import plan, plan_stages
from pocketvlm.pipeline.predict import as_measured, question_of, with_predictions
from pocketvlm.pipeline.published import median_factor, published_factors
from pocketvlm.pipeline.sources import select_targets
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reference.shapes import load_shape
from pocketvlm.reports.measurement import (
    Environment,
    Figure,
    Latency,
    MeasuredArm,
    MeasuredBundle,
    Measurement,
    Prompt,
)

SHAPE = load_shape("smolvlm-256m")
INT4 = load_recipe("int4-balanced")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "measure_rates", lambda *_: load_reference().rates)


def test_a_plan_without_a_device_predicts_no_time():
    assert plan(SHAPE, INT4).prediction is None


def test_times_are_predicted_for_a_phone_and_said_to_be_predicted():
    made = plan(SHAPE, INT4, device="galaxy-s25")
    found = made.prediction
    assert (found.threads, found.tiles, found.rows) == (8, 17, 17 * 32 + 32)
    assert found.times.decode_tok_s > 0
    shown = [line for line in made.lines() if "_ms" in line or "tok_s" in line]
    assert len(shown) == 8
    assert all(line.endswith("predicted") for line in shown)
    json.dumps(made.to_json(), allow_nan=False)


def test_a_faster_phone_and_fewer_bits_are_predicted_to_be_faster():
    def decode(recipe, device):
        return plan(SHAPE, recipe, device=device).prediction.times.decode_tok_s

    assert decode(INT4, "galaxy-s25") > decode(INT4, "raspberry-pi-5")
    assert decode(INT4, "galaxy-s25") > 2 * decode(load_recipe("float"), "galaxy-s25")


@pytest.mark.parametrize(
    ("device", "targets", "reason"),
    [
        ("pixel-8", (), "its profile has no source for the bandwidth of its memory"),
        ("host", (), "this machine is not calibrated; run pocketvlm bench --calibrate-host"),
        ("iphone-15-pro", ("coreml",), "nothing is known of the speed of coreml"),
    ],
)
def test_what_cannot_be_predicted_says_why(device, targets, reason):
    made = plan(SHAPE, select_targets(load_recipe("float"), targets), device=device)
    assert made.prediction.times is None
    assert reason in "\n".join(made.lines())


def test_the_host_is_predicted_from_its_calibration():
    kept = host.calibrate_host(1)
    found = plan(SHAPE, INT4, device="host").prediction
    assert found.threads == kept.rates.threads
    assert kept.measured_at in found.basis


def test_a_target_that_the_device_has_no_runtime_for_is_refused():
    recipe = select_targets(load_recipe("float"), ("onnx", "coreml"))
    assert plan(SHAPE, recipe, device="galaxy-s25").refused[-1] == (
        "galaxy-s25: runs onnx, executorch, and not coreml"
    )
    assert not plan(SHAPE, recipe, device="iphone-14").refused


def test_another_runtime_is_predicted_with_kernels_that_are_named():
    recipe = select_targets(load_recipe("float"), ("executorch",))
    found = plan(SHAPE, recipe, device="galaxy-s25").prediction
    assert "with the rates of ONNX Runtime's kernels" in found.basis
    assert found.times is not None


def test_memory_is_that_of_weights_as_the_runtime_holds_them():
    made = plan(SHAPE, load_recipe("float"))
    weights = sum(x.in_features * x.out_features for x in SHAPE.spec.linears())
    # Float32 in memory, of which files hold bf16; the table that is looked up stays narrow.
    assert made.ram_bytes > 3.5 * weights
    assert plan(SHAPE, INT4).ram_bytes < made.ram_bytes / 2.5


def test_memory_is_held_against_what_an_app_may_use(monkeypatch):
    device = load_device("iphone-14")
    limit = replace(device.app_memory_bytes, value=1e8, source="ram", note=None)
    monkeypatch.setattr(
        "pocketvlm.pipeline.plan.load_device", lambda _: replace(device, app_memory_bytes=limit)
    )
    assert "an app may use 0.10 GB" in plan(SHAPE, INT4, device="iphone-14").refused[-1]


def test_tiles_that_were_left_out_of_a_measured_prompt_are_not_predicted():
    spec = replace(SHAPE.spec, tiling=SplitGrid(side=512, first=2048))
    state = plan_stages((ReduceTokens(keep=16),), spec)
    question = question_of(state, PRESETS["vlm"])
    assert question.tiles == 17
    found = as_measured(question, Prompt(tokens=32 + 14 * 16, visual_tokens=14 * 16), state)
    assert (found.tiles, found.visual_rows, found.text_rows) == (14, 14 * 16, 32)
    assert as_measured(question, Prompt(), state) == question
    every = as_measured(question, Prompt(tokens=32 + 17 * 16, visual_tokens=17 * 16), state)
    assert every == replace(question, text_rows=32)


def test_a_measurement_of_this_host_gets_predictions_beside_it():
    state, workload = plan_stages((), SHAPE.spec), PRESETS["vlm"]
    targets = load_recipe("float").targets
    latency = Latency(figures={"prefill_ms": Figure(median=100.0)})
    ours = MeasuredArm(
        runtime="onnx",
        bundle=MeasuredBundle(manifest_sha256="d"),
        prompt=Prompt(tokens=96, visual_tokens=64),
        latency=latency,
    )
    other = replace(ours, bundle=MeasuredBundle(manifest_sha256="e"))
    bench = Measurement(
        environment=Environment(threads=1),
        arms={"ours": ours, "other": other, "executorch": replace(ours, runtime="executorch")},
    )
    assert with_predictions(bench, "d", state, targets, workload) is bench  # not calibrated
    host.calibrate_host(1)
    found = with_predictions(bench, "d", state, targets, workload).arms
    ((row,),) = (arm.predicted for arm in found.values() if arm.predicted is not None)
    assert row.name == "prefill_ms"
    assert row.ratio == pytest.approx(row.predicted / 100.0)
    assert found["ours"].predicted == (row,)
    two = replace(bench, environment=Environment(threads=2))
    assert with_predictions(two, "d", state, targets, workload) is two


def test_published_rates_are_predicted_within_a_factor_that_is_known():
    factors = [row for device in list_devices() for row in published_factors(device)]
    assert len(factors) >= 15
    for row in factors:
        assert 0.5 < row.factor < 8, row
    large = tuple(row for row in factors if row.decoder_weights >= 4e8)
    # What READ_SHARE was fitted to.
    assert median_factor(large, "decode_tok_s") == pytest.approx(1, abs=0.1)


def test_a_users_own_profile_is_planned_for(run_cli, tmp_path):
    text = (profiles._FOLDER / "raspberry-pi-5.yaml").read_text(encoding="utf-8")
    file = tmp_path / "my 'board'.yaml"
    file.write_text(text, encoding="utf-8")
    code, out, err = run_cli("plan", "shape:smolvlm-256m", "--device", file, "--json")
    assert code == 0, err
    assert json.loads(out)["prediction"]["times"]["decode_tok_s"] > 0
    file.write_text(text.replace("count: 4", "count: four"), encoding="utf-8")
    code, out, err = run_cli("plan", "shape:smolvlm-256m", "--device", file)
    assert code == 2
    assert err.splitlines()[-1].endswith('clusters.0.count: must be a whole number, not "four"')


def test_a_device_is_shown_with_its_sources_and_with_predictions_beside_published_figures(run_cli):
    code, out, err = run_cli("devices", "galaxy-s25", "--json")
    assert code == 0
    assert "84.8 GB/s  [geektopia" in err
    assert "times the published 47.6" in err
    document = json.loads(out)
    assert document["ram_bytes"]["value"] == 12e9
    assert len(document["predicted"]) == 6
    assert run_cli("devices", "nokia")[0] == 2


def test_all_devices_are_listed(run_cli):
    code, out, err = run_cli("devices", "--json")
    assert code == 0
    assert "raspberry-pi-5" in err
    assert len(json.loads(out)["devices"]) == len(list_devices())


def test_the_host_is_calibrated_by_bench_which_then_needs_no_bundle(run_cli):
    code, out, err = run_cli("bench", "--calibrate-host", "--threads", "1", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["path"] == str(host_file.calibration_path())
    assert document["path"] in err
    assert host_file.calibration_path().is_file()
    code, _, err = run_cli("bench")
    assert code == 2
    assert "BUNDLE is missing" in err
