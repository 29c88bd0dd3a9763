"""`optimum-cli export pocketvlm` runs the main job."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from pocketvlm.bundle import Bundle
from pocketvlm.cli.app import app
from pocketvlm.pipeline.doctor import examine
from tests.ecosystem.libraries import needed


def optimum_cli(*arguments):
    needed("optimum.commands.optimum_cli")
    program = Path(sys.executable).with_name("optimum-cli")
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_command_has_the_options_of_compress():
    asked = optimum_cli("export", "pocketvlm", "--help")
    assert asked.returncode == 0, asked.stderr
    words = set(asked.stdout.replace(",", " ").split())
    for option in typer.main.get_command(app).commands["compress"].params:
        if option.name not in ("model", "out"):
            assert {*option.opts, *option.secondary_opts} <= words, option.name
    assert "pocketvlm" in optimum_cli("export", "--help").stdout


def test_a_model_becomes_a_bundle(tiny_paths, tmp_path):
    asked = optimum_cli(
        *("export", "pocketvlm", "--model", tiny_paths["llava"], "--task", "image-text-to-text"),
        *("--recipe", "int8-safe", "--target", "onnx", "--calibration", "synthetic"),
        *("--set", "calibration.samples=4", "--data", "none", "--no-bench", tmp_path / "run"),
    )
    assert asked.returncode == 0, asked.stderr
    assert Bundle.open(tmp_path / "run" / "bundle").manifest.family == "llava"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "pocketvlm compress" in json.dumps(report)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "nowhere", "out"), 2, "no such directory"),
        (("--model", "nowhere", "--task", "fill-mask", "out"), 2, "fill-mask"),
        (("--model", "nowhere", "--recipe", "none", "out"), 2, "none"),
    ],
)
def test_a_wrong_word_is_told(arguments, code, message):
    asked = optimum_cli("export", "pocketvlm", *arguments)
    assert asked.returncode == code
    assert message in asked.stderr
    assert "Traceback" not in asked.stderr


def test_doctor_tells_the_plugins_version():
    needed("optimum.commands.optimum_cli")
    (found,) = (one for one in examine() if one.name == "pocketvlm-optimum")
    assert (found.verdict, found.detail.partition(";")[0]) == ("ok", version("pocketvlm-optimum"))
