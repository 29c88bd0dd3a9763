"""Times that a plan predicts, and what published figures say of such predictions."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.context import RunContext
from pocketvlm.device_bench.devices import list_devices, load_device
from pocketvlm.device_bench.devices import load as profiles
from pocketvlm.device_bench.devices.derive import load_reference
from pocketvlm.device_bench.prediction.calibration import host, host_file
from pocketvlm.device_bench.prediction.calibration.measure import MeasuredRates
from pocketvlm.device_bench.prediction.roofline import Question, predict_times
from pocketvlm.device_bench.prediction.work import read_work
from pocketvlm.errors import BundleError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.plan import plan, plan_stages
from pocketvlm.pipeline.predict import predict_work
from pocketvlm.pipeline.published import median_factor, published_factors
from pocketvlm.pipeline.sources import load_checkpoint, select_targets
from pocketvlm.recipes.load import load_recipe, recipe_from_document
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference.shapes import load_shape
from pocketvlm.stages import PlanState
from tests.fuzzing.documents import mutate_json

SHAPE = load_shape("smolvlm-256m")
INT4 = load_recipe("int4-balanced")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured = MeasuredRates(rates=load_reference().rates, probes={})
    monkeypatch.setattr(host, "measure_rates", lambda *_: measured)


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


@pytest.mark.parametrize("keep", [0.5, [16, 8]], ids=["one graph", "two graphs"])
def test_a_bundle_holds_the_counts_that_its_plan_predicted_from(tmp_path, keep):
    write_tiny_model("llava", tmp_path / "model")
    document = {
        "schema": 1,
        "name": "few",
        "stages": [
            {"method": "reduce_tokens", "reducer": {"kind": "uniform_stride"}, "keep": keep},
            {"method": "rtn", "rules": [{"bits": 4}]},
        ],
    }
    recipe = recipe_from_document(document, where="few")
    checkpoint = load_checkpoint(tmp_path / "model")
    planned = plan_stages(recipe.stages, checkpoint.spec, (ToOnnx(),))
    samples = CalibrationSet.synthetic(1)
    for stage in recipe.stages:
        checkpoint = stage.apply(checkpoint, samples, RunContext(threads=1))
    (tmp_path / "bundle").mkdir()
    write_graphs(checkpoint, (ToOnnx(),), tmp_path / "bundle", "", RunContext(threads=1))
    bundle = Bundle.open(tmp_path / "bundle")
    found = read_work(bundle)
    assert found == predict_work(planned, (ToOnnx(),))
    assert found != predict_work(PlanState.of(checkpoint.spec), (ToOnnx(),))
    assert len(found.model.visions) == len(bundle.each_vision())


def test_a_bundle_without_counts_or_with_later_ones_says_so_and_a_damaged_one_is_refused(tmp_path):
    write_tiny_model("llava", tmp_path / "model")
    folder = tmp_path / "bundle"
    folder.mkdir()
    checkpoint = load_checkpoint(tmp_path / "model")
    write_graphs(checkpoint, (ToOnnx(),), folder, "", RunContext(threads=1))
    bundle, file = Bundle.open(folder), folder / "work.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "schema": 9}))
    assert "schema 9, and this version reads 2" in read_work(bundle)
    for change, reason in (
        ({"weight_bytes": "many"}, "not the work of a bundle: weight_bytes"),
        ({"weight_bytes": {"onnx": -1}}, "numbers of bytes must be 0 to"),
        ({"weight_bytes": {}}, "weight_bytes lacks onnx"),
        ({"decoder": {"heads": -1, "row_bytes": 1}}, "heads must be 0 to"),
        ({"activation_bytes": [1, 2]}, "is not about the 1 vision graphs of the manifest"),
    ):
        file.write_text(json.dumps({**document, **change}))
        with pytest.raises(BundleError, match=f"work.json: .*{reason}"):
            read_work(bundle)
    files = {name: value for name, value in bundle.manifest.files.items() if name != "work.json"}
    before = replace(bundle, manifest=replace(bundle.manifest, files=files))
    assert read_work(before).endswith("has no work.json; an export by this version writes one")


def test_whatever_a_stranger_s_counts_say_is_refused_or_predicts_a_number(tmp_path):
    write_tiny_model("smolvlm", tmp_path / "model")
    folder = tmp_path / "bundle"
    folder.mkdir()
    checkpoint = load_checkpoint(tmp_path / "model")
    write_graphs(checkpoint, (ToOnnx(),), folder, "", RunContext(threads=1))
    bundle, file = Bundle.open(folder), folder / "work.json"
    before, rng = file.read_bytes(), random.Random(0)
    question = Question(
        text_rows=8, visual_rows=8, tiles_by_vision=(1,), picture_pixels=64, new_tokens=4
    )
    outcomes = Counter()
    for _ in range(900):
        file.write_bytes(mutate_json(rng, before))
        try:
            work = read_work(bundle)
        except BundleError:
            outcomes["refused"] += 1
            continue
        if isinstance(work, str) or isinstance(work.model, str):
            outcomes["reason"] += 1
            continue
        times = predict_times(work.model, question, load_reference().rates)
        assert all(math.isfinite(value) for value in vars(times).values())
        outcomes["predicted"] += 1
    assert min(outcomes.values()) > 5, outcomes


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


@pytest.mark.usefixtures("quick_compress_rates")
def test_the_host_is_calibrated_by_bench_which_then_needs_no_bundle(run_cli):
    code, out, err = run_cli("bench", "--calibrate-host", "--threads", "1", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["path"] == str(host_file.calibration_path())
    assert document["path"] in err
    assert host_file.calibration_path().is_file()
    assert document["compress"]["path"] in err
    assert plan(SHAPE, load_recipe("int4-small")).compress_time.seconds.keys() == {"1"}
    code, _, err = run_cli("bench")
    assert code == 2
    assert "BUNDLE is missing" in err
