from __future__ import annotations

import json

import pytest

from pocketvlm.errors import InputError
from pocketvlm.reports.report_file import read_report

REPORT = {
    "schema": 1,
    "latency": {"onnx": {"vision_ms": {"samples": [1.0], "median": 1.0}}},
    "notes": ["a"],
}


def test_what_a_run_or_a_bench_wrote_is_read(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == REPORT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "holds a JSON array"),
        ("{}", "is no report"),
        ('{"schema": 2, "size": {"a": 1}}', "schema: is 2"),
        ('{"schema": true, "size": {"a": 1}}', "schema: is True"),
        ('{"size": [1]}', "size: must be an object, not a list"),
        ('{"size": 3}', "size: must be an object, not a number"),
        ('{"latency": {"onnx": 1}}', "latency.onnx: must be an object"),
        ('{"latency": {"onnx": {"vision_ms": 3}}}', "latency.onnx.vision_ms: must be an object"),
        ('{"latency": {"onnx": {"x_ms": {"samples": 3}}}}', "x_ms.samples: must be a list"),
        ('{"bench": {"latency": [3]}}', "bench.latency: must be an object"),
        ('{"bench": {"bundles": {"candidate": 3}}}', "bench.bundles.candidate: must be an object"),
        ('{"size": {"a": 1}, "notes": "x"}', "notes: must be a list, not text"),
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
