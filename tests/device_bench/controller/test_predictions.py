"""What was predicted stands beside what was measured, where a bundle holds its counts."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.controller.bench import BenchOptions
from pocketvlm.device_bench.controller.predictions import Predictable, _question_of
from pocketvlm.device_bench.controller.shown import ShownPicture, show_pictures
from pocketvlm.device_bench.devices import load_device
from pocketvlm.device_bench.devices.derive import load_reference
from pocketvlm.device_bench.prediction.calibration import host
from pocketvlm.device_bench.prediction.calibration.measure import MeasuredRates
from pocketvlm.device_bench.prediction.rates import Rates
from pocketvlm.device_bench.prediction.roofline import predict_times
from pocketvlm.device_bench.transports.host import HostTransport
from pocketvlm.device_bench.workload import draw_picture
from pocketvlm.errors import InputError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.images.tilings import TileGrid
from pocketvlm.pipeline.plan_memory import decoder_memory, predict_memory
from pocketvlm.pipeline.predict import model_work, question_of
from pocketvlm.pipeline.sources import inspect_model
from pocketvlm.reports.measurement import MeasuredWorkload, Memory, Prompt
from pocketvlm.runtime.vision import ANY_VISION, VisionChoice
from pocketvlm.stages import PlanState
from tests.device_bench.rig import SCRIPTED, ScriptedTransport, bench, make_block
from tests.vision_graphs import GRAPHS

RATES = load_reference().rates
TIMES = ("preprocess_ms", "vision_ms", "prefill_ms", "decode_ms", "ttft_engine_ms", "ttft_user_ms")
RATIOS = ("prefill_tok_s", "decode_tok_s")


@pytest.fixture(autouse=True)
def calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate cache folder, where the reference's rates pass for this host's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "measure_rates", lambda *_: MeasuredRates(rates=RATES, probes={}))


def grown(block: Block, by: int) -> Block:
    return replace(block, memory=Memory(before_load_rss_bytes=10**6, peak_rss_bytes=10**6 + by))


class HostLike(ScriptedTransport):
    """Scripted outcomes that pass for this host's."""

    kind = HostTransport.kind


def test_after_a_calibration_every_time_has_its_prediction(tiny_bundle: Path) -> None:
    host.calibrate_host(RATES.threads)
    transport = HostLike([make_block() for _ in range(5)], environment={"threads": RATES.threads})
    result = bench([tiny_bundle], transport=transport)
    (arm,) = result.arms.values()
    assert arm.predicted is not None
    rows = {row.name: row for row in arm.predicted}
    assert set(rows) == {*TIMES, *RATIOS, "ram_bytes"}
    for name in (*TIMES, *RATIOS):
        assert rows[name].measured == arm.latency.figure(name).median
        assert rows[name].ratio == pytest.approx(rows[name].predicted / rows[name].measured)
    assert result.predicted_from is not None
    assert result.predicted_from.startswith("calibrated ")


def test_bench_predicts_of_the_bundle_what_plan_predicts_of_the_model(
    tiny_paths: dict[str, Path], tiny_bundle: Path
) -> None:
    state = PlanState.of(inspect_model(tiny_paths["smolvlm"])[0])
    model, question = model_work(state, (ToOnnx(),)), question_of(state, SCRIPTED)
    assert not isinstance(model, str)
    times = predict_times(model, question, RATES)
    host.calibrate_host(RATES.threads)
    prompt = Prompt(tokens=question.rows, visual_tokens=question.visual_rows)
    blocks = [replace(make_block(), prompt=prompt) for _ in range(5)]
    transport = HostLike(blocks, environment={"threads": RATES.threads})
    (arm,) = bench([tiny_bundle], transport=transport).arms.values()
    found = {row.name: row.predicted for row in arm.predicted or ()}
    assert {name: found[name] for name in (*TIMES, *RATIOS)} == vars(times)
    decoder, rows = state.spec.decoder, question.rows + SCRIPTED.new_tokens
    cache_bytes = 2 * 4 * decoder.depth * decoder.kv_heads * decoder.head_dim * rows
    prompt_bytes = decoder_memory(state).call_bytes(question.rows, rows)
    memory = predict_memory(state, (ToOnnx(),))
    asked = replace(memory, cache_bytes=cache_bytes, prompt_bytes=prompt_bytes)
    assert prompt_bytes > memory.activation_bytes
    assert found["ram_bytes"] == asked.total_bytes


def test_predictions_follow_the_rates(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(rates: Rates) -> dict[str, float]:
        measured = MeasuredRates(rates=rates, probes={})
        monkeypatch.setattr(host, "measure_rates", lambda *_: measured)
        host.calibrate_host(rates.threads)
        blocks = [make_block() for _ in range(5)]
        transport = HostLike(blocks, environment={"threads": rates.threads})
        (arm,) = bench([tiny_bundle], transport=transport).arms.values()
        return {row.name: row.predicted for row in arm.predicted or ()}

    before = predicted(RATES)
    slower = predicted(replace(RATES, call_us=RATES.call_us + 1e6))  # a second for every call
    assert slower["vision_ms"] == pytest.approx(before["vision_ms"] + 1000)
    assert slower["prefill_ms"] == pytest.approx(before["prefill_ms"] + 1000)
    assert slower["decode_ms"] == pytest.approx(before["decode_ms"] + 2000)  # the embedding's too


def test_memory_is_predicted_without_a_calibration_and_the_reason_is_said(
    tiny_bundle: Path,
) -> None:
    transport = HostLike([grown(make_block(), 10**6) for _ in range(5)])
    result = bench([tiny_bundle], transport=transport)
    assert result.predicted_from == (
        "no times: this machine is not calibrated; run pocketvlm bench --calibrate-host"
    )
    (arm,) = result.arms.values()
    assert arm.predicted is not None
    ((name, measured),) = ((row.name, row.measured) for row in arm.predicted)
    assert (name, measured) == ("ram_bytes", 10**6)


def test_rates_of_other_threads_predict_nothing(tiny_bundle: Path) -> None:
    host.calibrate_host(RATES.threads)
    threads = RATES.threads + 1
    transport = HostLike([make_block() for _ in range(5)], environment={"threads": threads})
    result = bench([tiny_bundle], transport=transport)
    assert result.predicted_from is not None
    said = f"no times: rates are of {RATES.threads} threads, and {threads} were measured"
    assert result.predicted_from.startswith(said)
    (arm,) = result.arms.values()
    assert {row.name for row in arm.predicted or ()} == {"ram_bytes"}


def test_a_device_is_predicted_from_the_profile_that_is_named(tiny_bundle: Path) -> None:
    profile = load_device("raspberry-pi-5")
    environment = {"threads": profile.performance_cores}

    def measured(options: BenchOptions) -> tuple[str | None, set[str]]:
        blocks = [make_block() for _ in range(5)]
        transport = ScriptedTransport(blocks, environment=environment)
        result = bench([tiny_bundle], transport=transport, options=options)
        (arm,) = result.arms.values()
        return result.predicted_from, {row.name for row in arm.predicted or ()}

    basis, names = measured(BenchOptions(device="board", profile=profile))
    assert basis is not None
    assert basis.startswith("derived from its profile")
    assert set(TIMES) < names
    basis, names = measured(BenchOptions(device="board"))
    assert basis == "no times: the device has no profile; --profile names one"
    assert names == {"ram_bytes"}


def test_a_bundle_without_counts_is_measured_and_the_reason_is_noted(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pocketvlm.device_bench.controller.bench.read_work", lambda _: "it has no counts"
    )
    result = bench([tiny_bundle], transport=HostLike([make_block() for _ in range(5)]))
    assert "bundle: nothing is predicted: it has no counts" in result.notes
    (arm,) = result.arms.values()
    assert arm.predicted is None


def test_a_picture_is_shown_to_the_graph_that_the_runtime_takes(graphs_bundle: Path) -> None:
    bundle = Bundle.open(graphs_bundle)
    names = [variant.name for variant in bundle.manifest.variants]
    assert tuple(names) == GRAPHS
    square, wide = draw_picture(64), wide_picture()

    def seen(*pictures: bytes, vision: VisionChoice = ANY_VISION) -> list[str]:
        return [names[one.vision] for one in show_pictures(bundle, pictures, vision)]

    assert seen(square, wide) == ["k8_64x64", "k8_96x32"]
    assert seen(wide, vision=VisionChoice(visual_tokens=3)) == ["k3_96x32"]
    assert seen(square, vision=VisionChoice(resolution=(96, 32))) == ["k8_96x32"]
    with pytest.raises(InputError, match="no vision graph for 5 visual tokens"):
        seen(square, vision=VisionChoice(visual_tokens=5))


def test_every_tile_is_counted_for_the_graph_that_sees_it(graphs_bundle: Path) -> None:
    manifest = Bundle.open(graphs_bundle).manifest
    shown = [
        ShownPicture(
            vision=vision, grid=grid, placeholders=12, kept=3, kept_of_whole=None, pixels=100
        )
        for vision, grid in ((3, TileGrid(rows=2, columns=2)), (1, TileGrid()), (3, TileGrid()))
    ]
    known = Predictable(manifest=manifest, work="not asked for", shown=shown)
    workload = MeasuredWorkload(new_tokens=4)
    found = _question_of(Prompt(tokens=40), workload, known)
    assert found.tiles_by_vision == (0, 1, 0, 6)
    assert (found.text_rows, found.visual_rows) == (40 - 7 * 3, 7 * 3)
    assert (found.picture_pixels, found.new_tokens) == (300, 4)
    counted = _question_of(Prompt(tokens=40, visual_tokens=8), workload, known)
    assert (counted.text_rows, counted.visual_rows) == (32, 8)


def wide_picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (300, 100), "teal").save(stream, format="PNG")
    return stream.getvalue()
