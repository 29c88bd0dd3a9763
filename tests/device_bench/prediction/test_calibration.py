from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketvlm.context import RunContext
from pocketvlm.device_bench.devices.derive import load_reference
from pocketvlm.device_bench.prediction.calibration import host, host_file
from pocketvlm.device_bench.prediction.calibration.host import calibrate_host
from pocketvlm.device_bench.prediction.calibration.host_file import (
    HostCalibration,
    calibration_path,
    read_calibration,
)
from pocketvlm.device_bench.prediction.calibration.host_stages import HostStages
from pocketvlm.device_bench.prediction.calibration.measure import (
    Effort,
    MeasuredRates,
    fit_attention,
    fit_product,
    fit_rates,
    measure_rates,
)
from pocketvlm.device_bench.prediction.calibration.probe_times import ProbeTimes
from pocketvlm.errors import StorageError
from pocketvlm.json_io import decode, encode

RATES = load_reference().rates


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setattr(host_file.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch) -> None:
    """Measuring takes no time: what is kept is tested, not what is measured."""
    probes = {"norm": ProbeTimes.of([3e-6, 1e-6, 2e-6])}
    found = MeasuredRates(rates=RATES, probes=probes)
    monkeypatch.setattr(host, "measure_rates", lambda *_: found)


def test_every_kernel_of_the_runtime_is_measured_for_real():
    seen = []
    effort = Effort(runs=1, probe_s=0.0, rounds=1, streamed_bytes=2**20)
    ctx = RunContext(on_progress=seen.append)
    measured = measure_rates(1, ctx, effort=effort)
    rates = measured.rates
    assert rates.threads == 1
    assert set(rates.products) >= {"float32", "int8 g32", "int4 g32", "int4 g64", "int4 g128"}
    assert set(rates.attention) == {"float32", "int8"}
    # What no machine of today falls below or reaches: a wrong unit would.
    for product in rates.products.values():
        assert 1e7 < product.macs_s < 1e18
        assert 1e6 < product.weights_s < 1e18
    assert 1e7 < rates.memory_read_bytes_s < 1e13
    assert 0 < rates.node_us < 1e4  # the least there is where noise hides what a node costs
    assert {step.note for step in seen} >= {"float32, small", "tower attention", "norm"}
    assert decode(type(rates), json.loads(json.dumps(encode(rates)))) == rates
    # What is kept of the probes is all that the rates were fitted to.
    assert set(measured.probes) == {step.note for step in seen}
    seconds = {name: taken.median_s for name, taken in measured.probes.items()}
    stages = HostStages(
        decoded_pixels_s=rates.decoded_pixels_s,
        resized_pixels_s=rates.resized_pixels_s,
        sampled_logits_s=rates.sampled_logits_s,
        token_us=rates.token_us,
    )
    assert fit_rates(1, seconds, stages, rates.memory_read_bytes_s) == rates


def test_a_minute_is_the_most_that_is_begun():
    assert Effort().longest_s < 60


def test_rates_of_a_product_are_those_that_its_times_were_made_of():
    # 2 G weights/s, 7 us a node, 50 G multiplications/s.
    seconds = {
        "k, small": 512 * 768 / 2e9 + 7e-6,
        "k, large": 1024 * 3072 / 2e9 + 7e-6,
        "k, many rows": 128 * 768 * 2304 / 50e9 + 7e-6,
    }
    found = fit_product("k", seconds)
    assert found.weights_s == pytest.approx(2e9)
    assert found.node_us == pytest.approx(7)
    assert found.macs_s == pytest.approx(50e9)


def test_noise_that_makes_the_larger_product_faster_leaves_rates_that_can_be_used():
    seconds = {"k, small": 3e-3, "k, large": 1e-3, "k, many rows": 1e-9}
    found = fit_product("k", seconds)
    assert found.weights_s > 0
    assert found.node_us > 0
    assert found.macs_s > 0


def test_rates_of_attention_are_those_that_its_times_were_made_of():
    width = 2 * 9 * 64
    seconds = {
        "int8 cache, short": width * 32 / 4e9 + 2e-6,
        "int8 cache, long": width * 1024 / 4e9 + 2e-6,
        "int8 cache, many rows": width * 128 * 128 / 30e9 + 2e-6,
    }
    found = fit_attention("int8", seconds)
    assert found.row_macs_s == pytest.approx(4e9)
    assert found.node_us == pytest.approx(2)
    assert found.macs_s == pytest.approx(30e9)


def test_a_calibration_is_kept_and_read_again(cache, measured):
    assert "is not calibrated; run pocketvlm bench --calibrate-host" in read_calibration()
    kept = calibrate_host(1)
    assert calibration_path() == cache / "pocketvlm" / "host-calibration.json"
    assert read_calibration() == kept
    assert kept.rates == RATES
    assert kept.probes == {"norm": ProbeTimes(runs=3, fastest_s=1e-6, median_s=2e-6)}


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("processor", "another", "is of another processor (another, and now "),
        ("cores", 4096, "is of another number of cores (4096, and now "),
        ("onnxruntime", "0.1", "is of another ONNX Runtime (0.1, and now "),
        ("schema", 7, "schema 7, and this version reads 3"),
        ("rates", {}, "not a calibration of this version (rates.threads: is missing)"),
        ("extra", 1, "not a calibration of this version (extra: unknown key"),
    ],
)
def test_a_calibration_that_does_not_hold_here_is_not_used(measured, key, value, complaint):
    calibrate_host(1)
    file = calibration_path()
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    reason = read_calibration()
    assert complaint in reason
    assert reason.endswith("run pocketvlm bench --calibrate-host")
    assert "\n" not in reason


def test_rates_that_cannot_be_are_refused(measured):
    calibrate_host(1)
    file = calibration_path()
    document = json.loads(file.read_text())
    document["rates"]["node_us"] = -1.0
    file.write_text(json.dumps(document))
    assert "rates: node_us is -1; it must be above 0" in read_calibration()


def test_a_damaged_file_is_no_calibration(measured):
    calibrate_host(1)
    calibration_path().write_bytes(b"{")
    assert "not a calibration of this version" in read_calibration()


def test_a_folder_that_cannot_be_written_is_named(cache, measured):
    cache.write_text("a file where the folder would be")
    with pytest.raises(StorageError, match="host-calibration.json: cannot be written: "):
        calibrate_host(1)


@pytest.mark.parametrize(
    ("platform", "end"),
    [("darwin", "Library/Caches/pocketvlm"), ("win32", "AppData/Local/pocketvlm")],
)
def test_the_folder_is_the_systems_own(monkeypatch, platform, end):
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(host_file.sys, "platform", platform)
    assert calibration_path().parent.as_posix().endswith(end)


def test_the_file_is_typed():
    document = {"schema": 1, "rates": encode(RATES)}
    assert HostCalibration.__dataclass_fields__.keys() > document.keys()
