from __future__ import annotations

import copy
import json

import pytest

from pocketvlm.device_bench.compare import (
    DEFAULT_BOUNDS,
    compare_files,
    compare_reports,
    parse_bounds,
)
from pocketvlm.errors import InputError
from pocketvlm.reports.report_file import parse_report

REPORT = {
    "size": {"bundle_bytes": 1000},
    "quality": {"compressed": {"accuracy": 0.90}, "recovery": 0.98},
    "memory": {"peak_rss_bytes": 500},
    "latency": {
        "onnx": {
            name: {"samples": [value], "median": value}
            for name, value in (
                ("ttft_user_ms", 100.0),
                ("ttft_engine_ms", 50.0),
                ("prefill_tok_s", 800.0),
                ("decode_tok_s", 40.0),
            )
        }
    },
    "bench": {"workload": {"prompt_tokens": 32, "new_tokens": 128, "image_size": 512}},
    "environment": {"processor": "x", "threads": 2},
}


def changed(path, value):
    document = copy.deepcopy(REPORT)
    *way, last = path
    block = document
    for key in way:
        block = block[key]
    block[last] = value
    return document


def failing(second, first=REPORT, bounds=None):
    return {
        row.metric: row.verdict
        for row in compare_reports(parse_report(first), parse_report(second), bounds)
        if not row.passed
    }


def test_a_report_is_no_worse_than_itself():
    rows = compare_reports(parse_report(REPORT), parse_report(REPORT))
    assert [row.metric for row in rows] == list(DEFAULT_BOUNDS)
    assert {row.verdict for row in rows} == {"ok"}
    assert {row.regression for row in rows} == {0.0}


@pytest.mark.parametrize(
    ("path", "within", "beyond", "metric"),
    [
        (("size", "bundle_bytes"), 1020, 1021, "bundle_bytes"),
        (("memory", "peak_rss_bytes"), 550, 551, "peak_rss_bytes"),
        (("quality", "compressed", "accuracy"), 0.89, 0.889, "accuracy"),
        (("latency", "onnx", "ttft_user_ms", "median"), 110.0, 110.1, "ttft_user_ms"),
        (("latency", "onnx", "decode_tok_s", "median"), 36.0, 35.9, "decode_tok_s"),
    ],
)
def test_a_bound_separates_pass_from_fail(path, within, beyond, metric):
    assert failing(changed(path, within)) == {}
    assert failing(changed(path, beyond)) == {metric: "regressed"}


def test_better_is_never_worse():
    better = changed(("latency", "onnx", "decode_tok_s", "median"), 400.0)
    better["size"]["bundle_bytes"] = 1
    assert failing(better) == {}
    rows = compare_reports(parse_report(REPORT), parse_report(better))
    row = next(row for row in rows if row.metric == "decode_tok_s")
    assert row.regression == pytest.approx(-9.0)
    assert "better by 900.0%" in row.line()


def test_a_figure_that_b_lacks_fails():
    assert failing(changed(("latency", "onnx"), {"failed": "out of memory"})) == {
        "ttft_user_ms": "missing",
        "ttft_engine_ms": "missing",
        "prefill_tok_s": "missing",
        "decode_tok_s": "missing",
    }
    assert failing(changed(("quality",), None)) == {"accuracy": "missing"}


def test_a_figure_that_a_lacks_is_not_compared():
    unscored = parse_report(changed(("quality",), None))
    rows = compare_reports(unscored, parse_report(REPORT))
    assert {row.metric: row.verdict for row in rows}["accuracy"] == "not measured"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("bench", "workload", "new_tokens"), 64),
        (("bench", "workload", "image_size"), 256),
        (("environment", "processor"), "y"),
        (("environment", "threads"), 4),
    ],
)
def test_timings_of_other_conditions_are_not_comparable_and_sizes_are(path, value):
    verdicts = failing(changed(path, value))
    assert set(verdicts) == {"ttft_user_ms", "ttft_engine_ms", "prefill_tok_s", "decode_tok_s"}
    assert set(verdicts.values()) == {"not comparable"}


def test_bounds_are_shares_or_per_cent_over_the_defaults():
    bounds = parse_bounds(["decode_tok_s=5%", "load_ms=0.5"])
    assert bounds == {**DEFAULT_BOUNDS, "decode_tok_s": 0.05, "load_ms": 0.5}
    slower = changed(("latency", "onnx", "decode_tok_s", "median"), 37.9)
    assert failing(slower, bounds=bounds) == {"decode_tok_s": "regressed"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=0.1", "metric 'speed' is not known; there are bundle_bytes"),
        ("decode_tok_s", "'' is not a share; write decode_tok_s=0.05"),
        ("decode_tok_s=fast", "'fast' is not a share"),
        ("decode_tok_s=-1", "must be 0 or more"),
        ("decode_tok_s=nan", "must be 0 or more"),
    ],
)
def test_an_invalid_bound_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_bounds([text])


def test_files_folders_and_bench_documents_are_accepted(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    arm = {"latency": REPORT["latency"]["onnx"], "bundle": {"stored_bytes": 1000}}
    alone = {"reference": "a", "arms": {"a": arm}, "environment": REPORT["environment"]}
    (run / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "bench.json").write_text(json.dumps({"bench": {**REPORT["bench"], **alone}}))
    assert {row.verdict for row in compare_files(run, run)} == {"ok"}
    rows = compare_files(tmp_path / "bench.json", tmp_path / "bench.json")
    assert {row.target for row in rows} == {None, "a"}
    assert {row.verdict for row in rows} == {"ok", "not measured"}
    json.dumps([row.to_json() for row in rows], allow_nan=False)
    with pytest.raises(InputError, match=r"nothing\.json"):
        compare_files(run, tmp_path / "nothing.json")
