"""Every way in that can be wrong: one line, exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from pocketvlm.cli import interrupts
from pocketvlm.reference.random_models import write_tiny_model

from .conftest import RECIPE


def assert_one_line(result, message):
    code, _, err = result
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) <= 1


def test_models_that_are_none(run_cli, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for model, message in [
        (tmp_path / "empty", "config.json is missing"),
        (tmp_path / "nothing", "no such directory"),
        ("reference:pocket-gpt", "pocket-llava"),
        ("shape:gpt-5", "smolvlm-256m"),
        ("nobody/no-such-model", "neither a local directory nor available from the hub"),
    ]:
        assert_one_line(run_cli("compress", model, "--out", out), message)
    assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stages.0.kep=1", "unknown key"),
        ("stages.0.keep=x", "stages.0.keep"),
        ("stages.0.keep=17", "more than the 16"),
        ("stages.0.keep=0", "at least 1"),
        ("stages.1.rules.0.group_size=48", "48"),
        ("stages.1.rules.0.match=nowhere", "matches none"),
        ("stages.1.rules.0.bits=5", "5"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_recipes_that_cannot_work(run_cli, tiny_paths, tmp_path, command, setting, message):
    recipe = tmp_path / "test.yaml"
    recipe.write_text(RECIPE)
    arguments = [command, tiny_paths["llava"], "--recipe", recipe, "--set", setting]
    if command == "compress":
        arguments += ["--out", tmp_path / "out"]
    assert_one_line(run_cli(*arguments), message)
    assert not (tmp_path / "out").exists()


def test_calibration_folders_that_hold_nothing(run_cli, tiny_paths, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    arguments = [
        *("compress", tiny_paths["llava"], "--out", tmp_path / "out", "--calibration", folder)
    ]
    assert_one_line(run_cli(*arguments), "data.jsonl is missing")
    (folder / "data.jsonl").write_text("")
    assert_one_line(run_cli(*arguments), "is empty")
    (folder / "data.jsonl").write_text(
        json.dumps({"image": "a.png", "question": "what?", "answer": "that"}) + "\n"
    )
    (folder / "a.png").write_bytes(b"no picture")
    assert_one_line(run_cli(*arguments), "a.png")


def test_photographs_are_looked_at_like_rows_of_a_folder(run_cli, tiny_paths, tmp_path):
    plan = ("plan", tiny_paths["llava"], "--set", "calibration.samples=3", "--calibration")
    code, _, err = run_cli(*plan, "photos")
    assert code == 0, err
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    assert_one_line(run_cli(*plan, f"photos:{tmp_path}"), "a.jpg")


def test_words_that_the_command_line_does_not_know(run_cli, tiny_paths):
    assert run_cli("compress")[0] == 2
    assert run_cli("conquer")[0] == 2
    assert run_cli("plan", tiny_paths["llava"], "--device", "nokia-3310")[0] == 2


def test_asking_about_pictures_of_every_size(run_cli, finished_runs, tmp_path):
    bundle = finished_runs["llava"] / "bundle"
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    code, out, err = run_cli("ask", bundle, "--prompt", "what?", "--image", tmp_path / "dot.png")
    assert code == 0, err
    code, out, err = run_cli(
        *("ask", bundle, "--prompt", "what?", "--image", tmp_path / "dot.png"),
        *("--json", "--max-new-tokens", 3),
    )
    assert code == 0, err
    assert set(json.loads(out)) == {"text", "token_ids", "timings"}
    (tmp_path / "torn.png").write_bytes((tmp_path / "dot.png").read_bytes()[:40])
    assert_one_line(
        run_cli("ask", bundle, "--prompt", "what?", "--image", tmp_path / "torn.png"), "torn.png"
    )
    assert_one_line(
        run_cli("ask", bundle, "--prompt", "what?", "--image", tmp_path / "none.png"), "none.png"
    )


def test_prompts_without_picture_and_without_words(run_cli, finished_runs):
    bundle = finished_runs["smolvlm"] / "bundle"
    assert run_cli("ask", bundle, "--prompt", "hello", "--max-new-tokens", 2)[0] == 0
    assert_one_line(run_cli("ask", bundle, "--prompt", ""), "prompt")


def test_planning_loads_no_weights(run_cli, tiny_paths, tmp_path):
    """A directory without weights is enough."""
    (tmp_path / "model").mkdir()
    for name in ("config.json",):
        (tmp_path / "model" / name).write_bytes((tiny_paths["smolvlm"] / name).read_bytes())
    code, out, _ = run_cli("plan", tmp_path / "model", "--recipe", "int4-small", "--json")
    assert code == 0
    planned = json.loads(out)
    assert planned["visual_tokens"] == 8
    assert planned["bundle_bytes"] > 0
    assert any("processor_config.json is here" in note for note in planned["warnings"])


@pytest.mark.parametrize("name", ["smolvlm-tiles", "qwen2.5-vl", "llava-next"])
def test_without_weights_pictures_are_planned_as_with_them(run_cli, tmp_path, name):
    write_tiny_model(name, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*.safetensors"):
        file.unlink()
    plans = []
    for folder in ("whole", "bare"):
        code, out, _ = run_cli("plan", tmp_path / folder, "--recipe", "int4-small", "--json")
        assert code == 0
        plans.append(json.loads(out))
    whole, bare = plans
    for key in ("visual_tokens", "visual_tokens_full", "photo_tokens", "weight_bytes"):
        assert bare[key] == whole[key]
    (bare_processor,) = (tmp_path / "bare").glob("preprocessor_config.json")
    bare_processor.write_text('{"image_mean": [0.5]}')
    refused = run_cli("plan", tmp_path / "bare", "--recipe", "int4-small")
    assert_one_line(refused, "image_mean must have 3 numbers")


def test_the_plan_foresees_the_size_of_the_bundle(run_cli, tiny_paths, finished_runs, tmp_path):
    recipe = tmp_path / "test.yaml"
    recipe.write_text(RECIPE)
    for family, run in finished_runs.items():
        code, out, _ = run_cli("plan", tiny_paths[family], "--recipe", recipe, "--json")
        assert code == 0
        stored = sum(file.stat().st_size for file in (run / "bundle" / "onnx").iterdir())
        assert json.loads(out)["weight_bytes"] == pytest.approx(stored, rel=0.03)


def test_a_bundle_is_inspected(run_cli, finished_runs):
    code, out, err = run_cli("inspect", finished_runs["llava"] / "bundle", "--json")
    assert code == 0
    assert "vision" in err
    assert json.loads(out)["visual_tokens"] == 8


def test_lists_and_doctor(run_cli):
    code, out, err = run_cli("recipes", "--json")
    assert code == 0
    assert "int4-balanced" in err
    assert {one["name"] for one in json.loads(out)["recipes"]} >= {"int4-small", "float"}
    assert run_cli("recipes", "int4-small")[0] == 0
    assert run_cli("devices")[0] == 0
    code, out, _ = run_cli("doctor", "--json")
    assert code == 0
    names = {finding["name"] for finding in json.loads(out)["findings"]}
    assert {"torch", "onnxruntime", "coremltools", "pocketvlm-optimum", "memory"} <= names
    assert run_cli("--version")[1].strip()


def test_a_folder_that_is_no_bundle(run_cli, tmp_path):
    for command in (["ask", tmp_path, "--prompt", "x"], ["inspect", tmp_path], ["bench", tmp_path]):
        assert_one_line(run_cli(*command), "no bundle here")


def test_reports_of_runs_become_one_page(run_cli, finished_runs, tmp_path):
    page = tmp_path / "page.html"
    assert run_cli("report", *finished_runs.values(), "--out", page)[0] == 0
    assert "<html" in page.read_text()


def test_an_interrupt_that_python_forgets_stops_the_next_step(monkeypatch):
    """A KeyboardInterrupt inside a finalizer is printed and dropped by the interpreter."""
    monkeypatch.setattr(interrupts, "_received", [])
    before = signal.getsignal(signal.SIGINT)
    with interrupts.unwound_interrupts() as raise_if_interrupted:
        raise_if_interrupted()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_if_interrupted()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_while_libraries_are_imported_is_one_line(number, code, tiny_paths, tmp_path):
    """Sent from the first moment at which the package's own code runs."""
    script = (
        "import os, signal, sys; from pocketvlm.cli import interrupts, main\n"
        # Under nohup a child is born deaf to SIGHUP, and stays so.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "told = interrupts.install\n"
        f"interrupts.install = lambda: (told(), os.kill(os.getpid(), {int(number)}))\n"
        f"sys.argv = ['pocketvlm', 'compress', {str(tiny_paths['llava'])!r}, '--out', 'x']\n"
        "main()\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert finished.returncode == code
    assert finished.stderr == "interrupted; the same command resumes where this one stopped\n"
    assert not list(tmp_path.iterdir())
