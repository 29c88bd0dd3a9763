"""`pocketvlm bench` as it is typed, on a device that a script describes."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import get_type_hints

import pytest

from pocketvlm.cli import interrupts, main
from pocketvlm.cli.bench import bench
from pocketvlm.device_bench.workload import PRESETS
from pocketvlm.reports.report_file import read_report


@pytest.fixture
def type_bench(monkeypatch, tmp_path, capsys):
    """Runs the command; returns its exit code, its document and its messages."""
    (tmp_path / "phone.yaml").write_text("processor: made up\nslower: {base: 2.0}\n")

    def run(*arguments):
        words = ["bench", *map(str, arguments)]
        if "--device" not in words:
            words += ["--device", f"simulated:{tmp_path / 'phone.yaml'}"]
        monkeypatch.setattr(sys, "argv", ["pocketvlm", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return stop.value.code, said.out and json.loads(said.out), said.err

    return run


SHAPE = ("--workload", "vlm", "--image-size", 64, "--prompt-tokens", 48, "--new-tokens", 8)


def test_arms_grid_and_file(tiny_bundle, other, type_bench, tmp_path):
    axes = (*SHAPE, "--image-size", 32, "--turns", 2, "--pictures", 2, "--answers", 2)
    out = tmp_path / "bench.json"
    code, document, said = type_bench(other, tiny_bundle, *axes, "--out", out, "--json")
    assert code == 0, said
    assert document == json.loads(out.read_text())
    report = read_report(out)
    cells = (report.bench, *report.grid)
    assert [one.workload.name for one in cells] == ["vlm, 64 px", "vlm, 32 px"]
    assert list(report.bench.arms) == ["base", "bundle"]
    assert report.bench.workload.pictures == 2
    assert report.bench.environment.processor == "made up"
    for cell in cells:
        arm = cell.arms["bundle"]
        assert arm.ratios["decode_tok_s"] == pytest.approx(2.0, rel=0.05)
        assert len(arm.latency.figure("ttft_user_ms").samples) == 10
        assert len(arm.later_turns) == 1
    assert "workload vlm, 32 px" in said
    assert "decode_tok_s" in said


def test_vision_graphs_are_axes(graphs_bundle, type_bench):
    axes = ("--visual-tokens", 4, "--resolution", "64x64", "--visual-tokens", 8)
    code, document, said = type_bench(graphs_bundle, *SHAPE, *axes, "--json")
    assert code == 0, said
    cells = (document["bench"], *document["grid"])
    assert [one["workload"]["name"] for one in cells] == [
        "vlm, 4 visual tokens",
        "vlm, 8 visual tokens",
    ]
    asked = [(one["workload"]["visual_tokens"], one["workload"]["resolution"]) for one in cells]
    assert asked == [(4, [64, 64]), (8, [64, 64])]
    code, _, said = type_bench(graphs_bundle, *SHAPE, "--resolution", "64x32", "--json")
    assert code == 2
    assert "no vision graph for 64 x 32 pixels; this bundle has 8 visual tokens of" in said


def test_baseline_is_another_word_for_the_first(tiny_bundle, other, type_bench):
    _, first, _ = type_bench(tiny_bundle, *SHAPE, "--baseline", other, "--json")
    assert list(first["bench"]["arms"]) == ["base", "bundle"]
    assert first["bench"]["reference"] == "base"


def test_an_implausible_figure_is_not_published(tiny_bundle, type_bench, tmp_path):
    """60 MB of decoder at this rate would be read faster than the device reads memory."""
    script = tmp_path / "liar.yaml"
    script.write_text("peak_rss_bytes: 1000\n")
    code, document, said = type_bench(
        tiny_bundle, *SHAPE, "--json", "--device", f"simulated:{script}"
    )
    assert code == 1
    assert "not published: peak_rss_bytes" in said.splitlines()[-1]
    checks = document["bench"]["arms"]["bundle"]["plausibility"]
    assert [check["figures"] for check in checks if check["verdict"] == "fail"] == [
        ["peak_rss_bytes"]
    ]


def test_a_device_that_vanishes_leaves_what_was_measured(tiny_bundle, type_bench, tmp_path):
    script = tmp_path / "lost.yaml"
    script.write_text("faults: [{process: 3, kind: unreachable, after_answers: 2}]\n")
    code, document, said = type_bench(
        tiny_bundle,
        *(*SHAPE, "--answers", 4, "--json", "--device", f"simulated:{script}"),
    )
    assert code == 0
    arm = document["bench"]["arms"]["bundle"]
    # Three whole processes, and one measured answer of the fourth after its cold one.
    assert len(arm["latency"]["ttft_user_ms"]["samples"]) == 3 * 4 + 1
    assert arm["failures"][0]["answers"] == 1
    assert "the run ended early: the device is gone" in said


def test_an_interrupt_writes_what_was_measured(tiny_bundle, type_bench, tmp_path, monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("pocketvlm.device_bench.controller.bench.time.sleep", sleep)
    for name in ("_received", "_announced"):
        monkeypatch.setattr(interrupts, name, [])
    out = tmp_path / "bench.json"
    code, _, said = type_bench(tiny_bundle, *SHAPE, "--out", out)
    assert code == 130
    assert said.splitlines()[-1] == "interrupted"
    samples = read_report(out).bench.arms["bundle"].latency.figure("load_ms").samples
    assert len(samples) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtime", "executorch"], "has no graphs for executorch"),
        (["--device", "toaster"], "'toaster': is none of the ways to a device"),
        (["--profile", "toaster"], "'toaster' is not known"),
        (["--image", "nothing.png"], "nothing.png"),
        (["--image-size", "64", "--image-size", "64"], "names a value twice"),
        (["--resolution", "wide"], "--resolution is 'wide'; write width and height"),
        (
            ["--resolution", "64x64", "--resolution", "64x64"],
            "resolution: 64x64, 64x64 names",
        ),
        (["--visual-tokens", "5"], "no picture is shown to the vision graph for 5 visual tokens"),
        (["--workload", "vlm", "--visual-tokens", "5"], "no vision graph for 5 visual tokens"),
        (["--prompt-tokens", "4"], "the chat template alone takes"),
        (["--max-thermal-status", "9"], "less than or equal to 6"),
        (["--new-tokens", "100000"], "positions"),
        (["--workload", "huge"], "there are vlm, short"),
        (["--out", "nowhere/bench.json"], "nowhere is not a folder"),
        (["--out", "/"], "is a folder; name a file in it"),
    ],
)
def test_bad_input_is_one_line(tiny_bundle, type_bench, arguments, message):
    code, document, said = type_bench(tiny_bundle, "--json", *arguments)
    assert (code, document) == (2, "")
    assert message in said
    assert len(said.splitlines()) == 1


def test_the_help_names_every_workload():
    (option,) = get_type_hints(bench, include_extras=True)["workload"].__metadata__
    assert option.help.rstrip(".").replace(" or ", ", ").split(", ") == list(PRESETS)
