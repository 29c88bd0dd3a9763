"""A short seeded part of the fuzzer; `python -m tests.fuzzing` runs all of it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzzing.documents import mutate_json

ENTRIES = (
    *("recipe", "setting", "manifest", "tokenizer", "template", "processor", "generation", "graph"),
    *("weights", "config.json", "safetensors", "pocketvlm.json", "data.jsonl", "picture"),
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are watched through /proc")
def test_every_input_ends_in_an_answer_or_in_one_line(tmp_path):
    only = [word for entry in ENTRIES for word in ("--only", entry)]
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzzing", "--n", "280", "--workers", "1"),
            *("--patience", "4", "--work", str(tmp_path), *only),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_inputs_are_the_same_for_the_same_seed():
    content = b'{"a": [1, {"b": "text"}], "c": null}'
    made = [[mutate_json(random.Random(seed), content) for seed in range(50)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 40
