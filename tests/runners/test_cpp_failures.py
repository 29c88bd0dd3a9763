"""Whatever the C++ runner is given, it says in one line what is wrong and ends with status 2."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.controller.prompts import render_turns
from pocketvlm.device_bench.protocol import PROTOCOL, Turn
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.text import TextCodec
from tests.runners.test_tokenizer import copied, edit

Runner = tuple[str, ...]
Maker = Callable[[str], Bundle]
TURN = {"text": "what?", "rendered": "what?", "pictures": []}
BLOCK = {
    "schema": PROTOCOL,
    "job": "block",
    "bundle": "no such bundle",
    "runtime": "onnx",
    "turns": [TURN],
    "new_tokens": 2,
}


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ("", "the job is not valid"),
        ("[]", f"job schema null; this runner speaks {PROTOCOL}"),
        ({"schema": 1}, f"job schema 1; this runner speaks {PROTOCOL}"),
        ({"schema": PROTOCOL}, "the job is not valid"),
        ({"schema": PROTOCOL, "job": "dance"}, "job dance; this runner knows environment"),
        (
            {"schema": PROTOCOL, "job": "environment", "threads": 0},
            "threads must be at least 1",
        ),
        (BLOCK, "no such bundle: no bundle here: manifest.json is missing"),
        ({**BLOCK, "runtime": "coreml"}, "runtime is coreml; this runner has onnx"),
        ({**BLOCK, "turns": []}, "there are no turns"),
        ({**BLOCK, "turns": [{"text": "a"}]}, "a turn is not rendered"),
        ({**BLOCK, "turns": [{**TURN, "pictures": [0]}]}, "a picture that is not there"),
        ({**BLOCK, "pictures": ["%"]}, "not base64"),
        ({**BLOCK, "new_tokens": 0}, "new_tokens is 0; at least 1"),
        ({**BLOCK, "threads": -1}, "threads is -1; at least 1"),
        ({**BLOCK, "vision": {"resolution": ["wide"]}}, "the job is not valid"),
        ("[" * 100_000, "the job is not valid"),
    ],
)
def test_a_bad_job(job: str | dict[str, Any], reason: str, runner: Runner) -> None:
    text = job if isinstance(job, str) else json.dumps(job)
    done = subprocess.run(runner, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["schema"], last["status"]) == (PROTOCOL, "failed")
    assert reason in last["reason"]
    assert "\n" not in last["reason"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rendered", "a"], "a bundle needs --rendered"),
        (["bundle"], "a bundle needs --rendered"),
        (["--dance"], "--dance is not understood"),
        (["bundle", "--rendered"], "--rendered needs a value"),
        (["bundle", "--rendered", "a", "--threads", "2x"], "--threads 2x: not a number above 0"),
        (["bundle", "--rendered", "a", "--resolution", "64"], "--resolution 64: not WIDTHxHEIGHT"),
        (["bundle", "--rendered", "a", "--resolution", "8x0"], "0: not a number above 0"),
        (["bundle", "--rendered", "a", "--visual-tokens", "few"], "few: not a number above 0"),
        (["bundle", "--image", "gone.jpg", "--rendered", "a"], "gone.jpg: no such file"),
        (["bundle", "--rendered", "a"], "bundle: no bundle here"),
        (["--job", "gone.json"], "gone.json: no such file"),
    ],
)
def test_bad_words(words: list[str], reason: str, runner: Runner) -> None:
    done = subprocess.run([*runner, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert reason in line


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a picture in a format that is read; allowed are JPEG and PNG"),
        (b"GIF89a", "not a picture in a format that is read"),
        (b"\xff\xd8\xff\xe0nothing", "damaged or not supported"),
        (b"\x89PNG\r\n\x1a\nnothing", "damaged or not supported"),
    ],
)
def test_a_bad_picture(
    content: bytes, reason: str, runner: Runner, make_bundle: Maker, tmp_path: Path
) -> None:
    picture = tmp_path / "picture"
    picture.write_bytes(content)
    assert_refused(runner, make_bundle("pocket-llava").path, picture, reason)


def test_a_picture_that_ends_early(
    runner: Runner, make_bundle: Maker, pictures: list[Path], tmp_path: Path
) -> None:
    for file in pictures[:2]:
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2])
        assert_refused(
            runner, make_bundle("pocket-llava").path, tmp_path / file.name, "the file ends early"
        )


def assert_refused(runner: Runner, bundle: Path, picture: Path, reason: str) -> None:
    words = ("--image", picture, "--rendered", "<image>", "--pixels")
    done = subprocess.run([*runner, bundle, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert reason in line


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("manifest.json", {"schema": 9}, "bundle schema 9; this runner reads 1"),
        ("manifest.json", {"positions": "odd"}, "positions are odd"),
        ("manifest.json", {"components": []}, "the bundle has no ONNX graphs"),
        ("manifest.json", {"visual_tokens": "many"}, "type must be number"),
        ("manifest.json", {"visual_tokens": 0}, "visual_tokens are 0 of"),
        ("manifest.json", {"variants": [{"name": "a"}]}, "visual_tokens"),
        ("manifest.json", {"tile_budget": {}}, "tile_budget is not followed"),
        ("processor_config.json", {"image_processor": {"image_processor_type": "X"}}, "X is not"),
    ],
)
def test_a_bad_bundle(
    file: str,
    change: dict[str, Any],
    reason: str,
    runner: Runner,
    make_bundle: Maker,
    tmp_path: Path,
) -> None:
    folder = copied(make_bundle("pocket-llava"), tmp_path / 'a "bundle"\nof two lines')
    edit(folder, file, lambda document: document.update(change))
    words = ("--rendered", "a", "--tokens")
    done = subprocess.run([*runner, folder, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert reason in done.stderr


def test_graphs_of_another_bundle(runner: Runner, make_bundle: Maker, tmp_path: Path) -> None:
    bundle = make_bundle("pocket-llava")
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    shutil.copy(folder / "onnx" / "embedding.onnx", folder / "onnx" / "decoder.onnx")
    words = ("--rendered", "a")
    done = subprocess.run([*runner, folder, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "its inputs or outputs are not those that the manifest names" in line


def test_pictures_and_their_marks_must_match(
    runner: Runner, make_bundle: Maker, pictures: list[Path]
) -> None:
    words = (make_bundle("pocket-llava").path, "--image", pictures[0], "--rendered", "no mark")
    done = subprocess.run([*runner, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "places for 0 pictures where 1 are shown" in done.stderr


def write_graph_that_fails(file: Path) -> None:
    """A vision graph that loads, and fails as soon as it is run."""
    helper, number = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "shape"], ["embeds"]),
        helper.make_node("Shape", ["embeds"], ["indices"]),
    ]
    graph = helper.make_graph(
        nodes,
        "fails",
        [helper.make_tensor_value_info("pixel_values", number.FLOAT, [1, 3, None, None])],
        [
            helper.make_tensor_value_info("embeds", number.FLOAT, [7]),
            helper.make_tensor_value_info("indices", number.INT64, [1]),
        ],
        [helper.make_tensor("shape", number.INT64, [1], [7])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("name", ["pocket-tiles", "smolvlm-tiles-empty", "qwen2.5-vl"])
def test_too_many_pictures_are_refused_before_one_is_encoded(
    name: str, runner: Runner, make_bundle: Maker, pictures: list[Path], tmp_path: Path
) -> None:
    bundle = make_bundle(name)
    shown = pictures[:2]
    answer = Conversation(bundle).ask("what?", shown, max_new_tokens=1)
    (turn,) = render_turns(TextCodec.from_bundle(bundle), [Turn(text="what?", pictures=(0, 1))])
    rows, visual = answer.timings.prompt_tokens, answer.timings.visual_tokens
    words = [word for file in shown for word in ("--image", file)]
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    write_graph_that_fails(folder / "onnx" / "vision.onnx")
    for limit, reason in (
        (2048, "vision.onnx: ONNX Runtime cannot run it"),
        (rows - 1, f"needs {rows} rows of KV cache, {visual} of them for pictures; allowed are"),
    ):
        edit(
            folder,
            "manifest.json",
            lambda document, limit=limit: document["generation"].update(max_positions=limit),
        )
        done = subprocess.run(
            [*runner, folder, *words, "--rendered", turn.rendered],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert reason in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 1
