"""One real run of each tiny model, shared by the tests that only look at it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.cli import interrupts, main
from pocketvlm.pipeline.compress_time import measure
from tests.forked import fork_cli
from tests.shared import make_once

RECIPE = """
schema: 1
name: test
calibration: {source: synthetic, samples: 4}
stages:
  - {method: reduce_tokens, keep: 0.5}
  - method: gptq
    rules:
      - {part: tower, bits: 8, group_size: 32}
      - {match: '.*', bits: 4, group_size: 32}
targets:
  - {method: onnx, accuracy_level: 0, tower_accuracy_level: 0}
"""


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Runs the command line in this process; returns its code and what it printed."""

    # Those of the command line would end this process.
    monkeypatch.setattr(interrupts, "install", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pocketvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "test.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four pictures with questions."""
    folder = tmp_path_factory.mktemp("questions")
    rng = np.random.default_rng(0)
    lines = []
    for index in range(4):
        name = f"{index}.png"
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(folder / name)
        lines.append(json.dumps({"image": name, "question": "what is it?", "answer": "noise"}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def finished_runs(tiny_paths, recipe_path, tmp_path_factory):
    """Run folders of both tiny models, by family."""

    def make(root):
        for family, path in tiny_paths.items():
            fork_cli(
                *("compress", path, "--recipe", recipe_path, "--out", root / family),
                *("--no-bench", "--threads", 1),
                check=0,
            )

    root = make_once(tmp_path_factory, "finished-runs", make)
    return {family: root / family for family in tiny_paths}


@pytest.fixture
def quick_compress_rates(monkeypatch):
    """Has the speed of compression measured on layers that a test can wait for."""
    for name, sizes in {
        "_TOKENS": 32,
        "_WIDTH": 64,
        "_FACTORED": (32, 96),
        "_LAYERS": ((32, 64), (256, 64), (32, 128)),
    }.items():
        monkeypatch.setattr(measure, name, sizes)
