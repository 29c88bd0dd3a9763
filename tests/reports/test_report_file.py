from __future__ import annotations

import json

import pytest

from pocketvlm.errors import InputError
from pocketvlm.reports.measurement import Figure, Latency
from pocketvlm.reports.report_file import read_report

REPORT = {
    "schema": 2,
    "latency": {"onnx": {"vision_ms": {"samples": [1.0], "median": 1.0}}},
    "notes": ["a"],
}


def read(tmp_path, document):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(document))
    return read_report(file)


def test_what_a_run_wrote_is_read_once_into_values(tmp_path):
    report = read(tmp_path, REPORT)
    figure = Figure(samples=(1.0,), median=1.0)
    assert report.latency == {"onnx": Latency(figures={"vision_ms": figure})}
    assert report.notes == ("a",)
    assert report.document == REPORT
    assert read_report(tmp_path) == report


def test_what_bench_wrote_is_a_report_of_measurements_alone(tmp_path):
    failure = {"repeat": 1, "reason": "ended by SIGKILL"}
    arm = {"latency": REPORT["latency"]["onnx"], "failures": [failure]}
    bench = {"reference": "a", "arms": {"a": arm, "b": arm}}
    report = read(tmp_path, {"schema": 2, "bench": bench, "grid": [bench, bench]})
    assert report.bench.arms["b"].latency == Latency(
        figures={"vision_ms": Figure(samples=(1.0,), median=1.0)}
    )
    assert list(report.bench.compared) == ["b"]
    assert (report.failures, report.bench.arms["a"].failures[0].repeat) == ((), 1)
    assert [one.reference for one in report.grid] == ["a", "a"]


def test_keys_of_a_later_version_are_skipped_and_null_is_not_measured(tmp_path):
    later = {"size": {"bundle_bytes": 7, "new": []}, "energy": {"joules": 1}, "quality": None}
    report = read(tmp_path, {**later, "notes": None, "stages": [None, {"seconds": None}]})
    assert report.size.bundle_bytes == 7
    assert report.quality is None
    assert report.notes == ()
    assert [stage.seconds for stage in report.stages] == [None]


def test_a_loss_may_be_as_small_as_it_likes(tmp_path):
    """A layer whose weights are on the grid has a tiny loss, and its report is readable."""
    stage = {"method": "gptq", "layers": [{"name": "q", "loss": 3e-31}]}
    report = read(tmp_path, {"size": {"bundle_bytes": 7}, "stages": [stage]})
    assert report.stages[0].layers[0]["loss"] == 3e-31


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "holds a JSON array"),
        ("{}", "is not a report"),
        ('{"schema": 1, "size": {"a": 1}}', "schema: is 1; this version reads 2"),
        ('{"schema": true, "size": {"a": 1}}', "schema: is True"),
        ('{"size": [1]}', "size: must be an object, not a JSON array"),
        ('{"size": 3}', "size: must be an object, not 3"),
        ('{"latency": {"onnx": 1}}', "latency.onnx: must be an object"),
        ('{"latency": {"onnx": {"vision_ms": 3}}}', "latency.onnx.vision_ms: must be an object"),
        ('{"latency": {"onnx": {"x_ms": {"samples": 3}}}}', "x_ms.samples: must be a list"),
        ('{"bench": {"arms": [3]}}', "bench.arms: must be an object"),
        ('{"bench": {"arms": {"a": 3}}}', "bench.arms.a: must be an object"),
        ('{"size": {"a": 1}, "notes": "x"}', 'notes: must be a list, not "x"'),
        (
            '{"size": {"bundle_bytes": "big"}}',
            'size.bundle_bytes: must be a whole number, not "big"',
        ),
        ('{"quality": {"compressed": 0.9}}', "quality.compressed: must be an object, not 0.9"),
        ('{"parity": {"passed": "yes"}}', 'parity.passed: must be true or false, not "yes"'),
        ('{"size": {"a": 1}, "stages": [3]}', "stages.0: must be an object, not 3"),
        (
            '{"latency": {"onnx": {"x_ms": {"samples": [1, "a"]}}}}',
            "x_ms.samples.1: must be a numb",
        ),
        (
            '{"size": {"a": 1}, "stages": [{"layers": [{"a": 1e300}]}]}',
            "a: is a number out of range",
        ),
        ('{"size": {"a": NaN}}', "size.a: is a number out of range"),
        ('{"size": {"a": [1, -Infinity]}}', "size.a.1: is a number out of range"),
        ('{"size": {"a": 1e300}}', "size.a: is a number out of range"),
        ('{"size": {"a": 5e-324}}', "size.a: is a number out of range"),
        ('{"size": {"a": 1' + "0" * 400 + "}}", "size.a: is a number out of range"),
        ('{"size": ' + '{"a": ' * 30 + "1" + "}" * 31, "nested more than 24"),
    ],
)
def test_whatever_else_is_one_line_with_its_place(tmp_path, text, message):
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_report(file)
    assert str(caught.value).startswith(str(file))
