from __future__ import annotations

import copy
import json
from pathlib import Path
from statistics import median
from typing import get_type_hints

import numpy as np
import pytest

from pocketvlm.cli.app import run_command
from pocketvlm.cli.report import compare
from pocketvlm.device_bench.gate.bounds import DEFAULT_BOUNDS, parse_bounds
from pocketvlm.device_bench.gate.compare import compare_arms, compare_files, compare_reports
from pocketvlm.errors import CheckFailedError, InputError, TooNoisyError
from pocketvlm.machine import REPORT_SCHEMA
from pocketvlm.reports.report_file import parse_report

TIMED = {"ttft_user_ms": 100.0, "ttft_engine_ms": 50.0, "decode_ms": 25.0, "decode_tok_s": 40.0}


def figure(values):
    return {"samples": values, "median": median(values), "by_repeat": values}


def arm(times=TIMED, processes=6, **more):
    """An arm whose processes all took the same time."""
    return {
        "runtime": "onnx",
        "bundle": {"stored_bytes": 1000},
        "memory": {"peak_rss_bytes": 500},
        "latency": {name: figure([value] * processes) for name, value in times.items()},
        **more,
    }


REPORT = {
    "schema": REPORT_SCHEMA,
    "size": {"bundle_bytes": 1000},
    "quality": {"compressed": {"accuracy": 0.90}, "recovery": 0.98},
    "bench": {
        "reference": "float",
        "arms": {"float": arm(), "int4": arm()},
        "workload": {"prompt_tokens": 32, "new_tokens": 128, "image_size": 512},
        "environment": {"processor": "x", "threads": 2},
    },
}
INT4 = ("bench", "arms", "int4")


def changed(path, value):
    document = copy.deepcopy(REPORT)
    *way, last = path
    block = document
    for key in way:
        block = block[key]
    block[last] = value
    return document


def failing(second, first=REPORT, bounds=DEFAULT_BOUNDS):
    return {
        row.metric: row.verdict
        for row in compare_reports(parse_report(first), parse_report(second), bounds)
        if not row.passed
    }


def arms_failing(document, arms=None, bounds=DEFAULT_BOUNDS):
    rows = compare_arms(parse_report(document), arms, bounds)
    return {row.name: row.verdict for row in rows if not row.passed}


def test_a_report_is_no_worse_than_itself():
    rows = compare_reports(parse_report(REPORT), parse_report(REPORT))
    assert [row.metric for row in rows] == list(DEFAULT_BOUNDS)
    assert {row.verdict for row in rows} == {"ok"}
    assert {row.regression for row in rows} == {0.0}


@pytest.mark.parametrize(
    ("path", "within", "beyond", "metric"),
    [
        (("size", "bundle_bytes"), 1020, 1021, "bundle_bytes"),
        ((*INT4, "memory", "peak_rss_bytes"), 550, 551, "peak_rss_bytes"),
        (("quality", "compressed", "accuracy"), 0.89, 0.889, "accuracy"),
        ((*INT4, "latency", "ttft_user_ms"), figure([105.0] * 6), figure([105.1] * 6), None),
        ((*INT4, "latency", "decode_ms"), figure([26.25] * 6), figure([26.3] * 6), None),
    ],
)
def test_a_bound_separates_pass_from_fail(path, within, beyond, metric):
    assert failing(changed(path, within)) == {}
    assert failing(changed(path, beyond)) == {metric or path[-1]: "regressed"}


def test_a_rate_is_worse_when_it_is_lower():
    bounds = parse_bounds(["decode_tok_s=5%"])
    slower = changed((*INT4, "latency", "decode_tok_s"), figure([37.9] * 6))
    assert failing(slower, bounds=bounds) == {"decode_tok_s": "regressed"}
    faster = changed((*INT4, "latency", "decode_tok_s"), figure([400.0] * 6))
    assert failing(faster, bounds=bounds) == {}
    rows = compare_reports(parse_report(REPORT), parse_report(faster), bounds)
    row = next(row for row in rows if row.metric == "decode_tok_s")
    assert row.regression == pytest.approx(-9.0)
    assert "better by 900.0% (900.0% to 900.0%)" in row.line()


def test_an_encoder_that_a_release_made_15_times_slower_fails_by_default():
    """llama.cpp's log of MobileVLM on a Snapdragon 778G: 18.7 s, and 288 s a release later."""

    def with_encoder(vision_ms):
        first_token_ms = vision_ms + TIMED["ttft_engine_ms"]
        return changed(INT4, arm({**TIMED, "vision_ms": vision_ms, "ttft_user_ms": first_token_ms}))

    before, after = with_encoder(18_700.0), with_encoder(288_000.0)
    assert failing(after, first=before) == {"ttft_user_ms": "regressed"}
    bounds = parse_bounds(["vision_ms=5%"])
    assert failing(after, first=before, bounds=bounds)["vision_ms"] == "regressed"
    assert failing(before, first=before, bounds=bounds) == {}


def test_a_bound_inside_the_interval_is_too_noisy_to_tell():
    scattered = [96.0, 99.0, 101.0, 108.0, 109.0, 112.0]
    noisy = changed((*INT4, "latency", "ttft_user_ms"), figure(scattered))
    assert failing(noisy) == {"ttft_user_ms": "too noisy"}
    rows = compare_reports(parse_report(REPORT), parse_report(noisy))
    row = next(row for row in rows if row.metric == "ttft_user_ms")
    assert row.low < row.bound < row.high
    assert (row.processes, row.reason[:15]) == (6, "not interleaved")
    wide = {**DEFAULT_BOUNDS, "ttft_user_ms": 0.2}
    assert failing(noisy, bounds=wide) == {}


def test_few_processes_are_no_evidence_however_alike():
    few = changed(INT4, arm({**TIMED, "decode_ms": 50.0}, processes=4))
    assert failing(few)["decode_ms"] == "too noisy"
    rows = compare_reports(parse_report(REPORT), parse_report(few))
    assert "4 processes; an interval needs 5" in {row.reason for row in rows}


def test_a_figure_that_b_lacks_fails():
    lost = changed((*INT4, "latency"), {"failed": "out of memory"})
    assert failing(lost) == dict.fromkeys(
        ("ttft_user_ms", "ttft_engine_ms", "decode_ms"), "missing"
    )
    assert failing(changed(("quality",), None)) == {"accuracy": "missing"}


def test_a_figure_that_a_lacks_is_not_compared():
    unscored = parse_report(changed(("quality",), None))
    rows = compare_reports(unscored, parse_report(REPORT))
    assert {row.metric: row.verdict for row in rows}["accuracy"] == "not measured"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("workload", "new_tokens"), 64),
        (("workload", "image_size"), 256),
        (("workload", "turns"), 2),
        (("environment", "processor"), "y"),
        (("environment", "threads"), 4),
    ],
)
def test_timings_of_other_conditions_are_not_comparable_and_sizes_are(path, value):
    verdicts = failing(changed(("bench", *path), value))
    assert set(verdicts) == {"ttft_user_ms", "ttft_engine_ms", "decode_ms"}
    assert set(verdicts.values()) == {"not comparable"}


def test_figures_that_are_not_plausible_are_not_compared():
    check = {"check": "c", "figures": ["decode_ms"], "verdict": "fail", "value": 1, "bound": 2}
    assert failing(changed((*INT4, "plausibility"), [check])) == {"decode_ms": "not comparable"}


def test_arms_of_one_run_are_compared_pair_by_pair():
    assert arms_failing(REPORT) == {}
    drift = [1.0, 1.5, 0.7, 2.0, 1.2, 0.9]
    document = changed(
        ("bench", "arms"),
        {
            name: arm({})
            | {"latency": {"decode_ms": figure([25 * scale * part for part in drift])}}
            for name, scale in (("float", 1.0), ("same", 1.02), ("slow", 1.1))
        },
    )
    assert arms_failing(document)["slow decode_ms"] == "regressed"
    assert "same decode_ms" not in arms_failing(document)
    assert arms_failing(document, ("slow", "float")).get("float decode_ms") is None
    row = next(
        row
        for row in compare_arms(parse_report(document), ("float", "slow"))
        if row.metric == "decode_ms"
    )
    assert (row.low, row.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_a_repeat_that_failed_in_one_arm_makes_no_pair():
    lame = arm()
    lame["latency"]["decode_ms"]["by_repeat"] = [25.0, None, 25.0, 25.0, None, 25.0]
    rows = compare_arms(parse_report(changed(INT4, lame)))
    row = next(row for row in rows if row.metric == "decode_ms")
    assert (row.verdict, row.reason) == ("too noisy", "4 pairs of processes; an interval needs 5")


@pytest.mark.parametrize(
    ("document", "arms", "message"),
    [
        (REPORT, ("float", "int2"), "has no arm 'int2'; there are float, int4"),
        (changed(("bench", "arms"), {"float": arm()}), None, "no two arms of one run"),
        (changed(("bench",), None), None, "no two arms of one run"),
    ],
)
def test_arms_that_are_not_there_are_refused_with_the_file(tmp_path, document, arms, message):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message) as caught:
        compare_files(file, arms=arms)
    assert str(caught.value).startswith(str(file))


def test_a_grid_of_workloads_is_refused(tmp_path):
    file = tmp_path / "grid.json"
    file.write_text(json.dumps({**REPORT, "grid": [REPORT["bench"]]}))
    for second in (None, file):
        with pytest.raises(InputError, match="is of 2 workloads; compare documents of one"):
            compare_files(file, second)


def recorded(random, *, slower=1.0, processes=20, busy=0.08):
    """An interleaved run on a shared machine: both arms drift alike, and neighbours come and go."""
    drift = np.exp(np.cumsum(random.normal(0, 0.03, processes)))

    def times(scale):
        own = random.lognormal(0.0, 0.02, processes)
        own[random.random(processes) < busy] *= random.uniform(1.1, 2.0)
        return [float(value) for value in 25 * scale * drift * own]

    arms = {
        name: arm({}) | {"latency": {"decode_ms": figure(times(scale))}}
        for name, scale in (("a", 1.0), ("b", slower))
    }
    bench = {**REPORT["bench"], "reference": "a", "arms": arms}
    return parse_report({"schema": REPORT_SCHEMA, "bench": bench})


@pytest.mark.parametrize(("slower", "least", "most"), [(1.0, 0, 1), (1.1, 19, 20)])
def test_noise_is_told_from_a_runtime_that_is_slower_by_a_tenth(slower, least, most):
    """benchmarks/gate_power.py shows the same with real runs."""
    random = np.random.default_rng(14)
    reported = sum(
        any(row.verdict == "regressed" for row in compare_arms(recorded(random, slower=slower)))
        for _ in range(20)
    )
    assert least <= reported <= most


@pytest.mark.parametrize(("name", "least", "most"), [("same", 0, 1), ("slowed", 19, 20)])
def test_real_rounds_on_a_busy_server_give_the_same_answer(name, least, most):
    """Twenty comparisons, each of twenty rounds drawn from those that gate_power.py measures."""
    file = Path(__file__).with_name("recorded_rounds.json")
    rounds = json.loads(file.read_text())["rounds"]
    random = np.random.default_rng(14)
    reported = 0
    for _ in range(20):
        chosen = random.choice(60, 20, replace=False)
        arms = {
            role: arm({})
            | {
                "latency": {
                    metric: figure([by_role[role][at] for at in chosen])
                    for metric, by_role in rounds.items()
                }
            }
            for role in ("reference", name)
        }
        report = parse_report({"bench": {"reference": "reference", "arms": arms}})
        reported += any(row.verdict == "regressed" for row in compare_arms(report))
    assert least <= reported <= most


def test_bounds_are_shares_or_per_cent_over_the_defaults():
    bounds = parse_bounds(["decode_tok_s=5%", "load_ms=0.5"])
    assert bounds == {**DEFAULT_BOUNDS, "decode_tok_s": 0.05, "load_ms": 0.5}


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


def test_the_command_tells_a_regression_from_noise_by_its_exit_code(tmp_path, capsys):
    files = {}
    for name, times in (
        ("a", [25.0] * 6),
        ("slow", [28.0] * 6),
        ("noisy", [20.0, 24.0, 26.0, 27.0, 30.0, 33.0]),
    ):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(changed((*INT4, "latency", "decode_ms"), figure(times))))
    run_command(["compare", str(files["a"]), str(files["a"])])
    with pytest.raises(CheckFailedError, match="onnx decode_ms") as caught:
        run_command(["compare", str(files["a"]), str(files["slow"])])
    assert caught.value.exit_code == 1
    with pytest.raises(TooNoisyError, match="too noisy to tell: onnx decode_ms") as caught:
        run_command(["compare", str(files["a"]), str(files["noisy"]), "--json"])
    assert caught.value.exit_code == 3
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["metric"]: row["verdict"] for row in rows}["decode_ms"] == "too noisy"
    run_command(["compare", str(files["a"]), "--arms", "float", "int4"])
    comment = tmp_path / "comment.md"
    with pytest.raises(CheckFailedError):
        run_command(["compare", str(files["a"]), str(files["slow"]), "--markdown", str(comment)])
    lines = comment.read_text().splitlines()
    assert lines[0] == "### Worse than allowed: 1 of 6 figures"
    (row,) = (line for line in lines if "decode" in line)
    assert row.startswith(
        "| onnx decode\\_ms | 25.0 ms | 28.0 ms | worse by 12.0% (12.0% to 12.0%) | 5.0% | REGR"
    )
    with pytest.raises(InputError, match="leave out the second report"):
        run_command(["compare", str(files["a"]), str(files["a"]), "--arms", "float", "int4"])


def test_the_help_names_every_default_bound():
    (option,) = get_type_hints(compare, include_extras=True)["max_regress"].__metadata__
    words = option.help.partition("Default: ")[2].rstrip(".").split(", ")
    assert [word.partition("=")[0] for word in words] == list(DEFAULT_BOUNDS)
    assert parse_bounds(words) == DEFAULT_BOUNDS


def test_files_folders_and_bench_documents_are_accepted(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.json").write_text(json.dumps(REPORT))
    bench = {"schema": REPORT_SCHEMA, "bench": REPORT["bench"]}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    rows = compare_files(tmp_path / "bench.json", run)
    assert {row.verdict for row in rows} == {"ok", "not measured"}
    json.dumps([row.to_json() for row in rows], allow_nan=False)
    with pytest.raises(InputError, match=r"nothing\.json"):
        compare_files(run, tmp_path / "nothing.json")
