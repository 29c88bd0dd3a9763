"""The ExecuTorch runner beside ONNX Runtime and beside ExecuTorch's own MultimodalRunner."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.cli import main
from pocketvlm.errors import BundleError, CheckFailedError, InputError
from pocketvlm.pipeline.native_runner import NativeComparison
from pocketvlm.printable import printable
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.engines import choose_engine, open_engine
from pocketvlm.runtime.executorch.native_runner import (
    UnspeakablePieceError,
    answer_with_multimodal_runner,
)
from pocketvlm.runtime.executorch.runner import ExecutorchRunner
from pocketvlm.runtime.text import TextCodec
from tests.runtime.conftest import CAPACITY


@pytest.fixture(scope="module")
def bundle(both_targets: Bundle) -> Bundle:
    return both_targets


@pytest.fixture
def runner(bundle: Bundle) -> ExecutorchRunner:
    return ExecutorchRunner(bundle, threads=1)


def test_the_manifest_names_the_version_that_wrote_the_program(bundle: Bundle) -> None:
    needs = bundle.manifest.runtimes["executorch"]
    assert needs.lowest_version == metadata.version("executorch")
    assert needs.formats == {"program": 12}


def test_graphs_agree_with_onnx(bundle: Bundle, runner: ExecutorchRunner) -> None:
    onnx = open_engine(bundle, "onnx", threads=1)
    side = bundle.component("onnx", "vision").inputs[0].shape[-1]
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    ours, theirs = runner.encode_image(pixels), onnx.encode_image(pixels)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(ours[1], theirs[1])
    ids = [5, 9, 5, 301]
    np.testing.assert_array_equal(runner.embed(ids), onnx.embed(ids))
    rows = np.concatenate([runner.embed(ids), ours[0]], axis=1)
    # Gaps, jumps ahead, and a second turn after rows that are forgotten again.
    for positions in ([0, 1, 2, 3, 5, 8, 10, 15, 18], list(range(40, 49))):
        at = np.array([positions])
        for engine in (runner, onnx):
            engine.reset()
        found, expected = runner.decode(rows, at).copy(), onnx.decode(rows, at).copy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        for engine in (runner, onnx):
            engine.decode(rows[:, :2], np.array([[60, 61]]))
            engine.truncate(7)
        turn = (rows[:, :3], np.array([[70, 72, 73]]))
        np.testing.assert_allclose(runner.decode(*turn), onnx.decode(*turn), rtol=1e-3, atol=1e-4)


def test_conversations_agree(bundle: Bundle, picture: Image.Image) -> None:
    talks = [
        Conversation(bundle, runner=open_engine(bundle, name, threads=1))
        for name in ("onnx", "executorch")
    ]
    first, second = (talk.ask("What is it?", picture, max_new_tokens=6) for talk in talks)
    assert first.token_ids == second.token_ids
    first, second = (talk.ask("And now?", max_new_tokens=6) for talk in talks)
    assert first.token_ids == second.token_ids
    assert second.timings.reused_tokens > 0


def test_multimodal_runner_gives_the_same_answer(
    bundle: Bundle, runner: ExecutorchRunner, picture: Image.Image
) -> None:
    talk = Conversation(bundle, runner=runner)
    decode = TextCodec.from_bundle(bundle).decode_raw
    answered = 0
    several = [picture, picture.rotate(180)]
    for prompt, image in product(("What?", "one"), (picture, several, None)):
        talk.reset()
        expected = talk.ask(prompt, image, max_new_tokens=3)
        pieces: list[str] = []
        ask = (bundle, prompt, image)
        # A random model says what it likes; a token may be a part of a character.
        if any("\N{REPLACEMENT CHARACTER}" in decode([token]) for token in expected.token_ids):
            with pytest.raises(UnspeakablePieceError):
                answer_with_multimodal_runner(*ask, max_new_tokens=3)
        else:
            text = answer_with_multimodal_runner(*ask, max_new_tokens=3, on_token=pieces.append)
            assert len(pieces) == len(expected.token_ids)
            assert text == "".join(pieces)
            assert text == expected.text
            answered += 1
    assert answered


def test_inspect_compares_the_native_runner(
    bundle: Bundle, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["inspect", str(bundle.path), "--native-runner", "--n", "6", "--tokens", "2"]
    monkeypatch.setattr("sys.argv", ["pocketvlm", *command, "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capfd.readouterr()
    assert stop.value.code == 0
    document = json.loads(told.out)
    assert document["asked"] == 6
    assert document["compared"] > 0
    assert not document["differences"]
    assert f"{document['compared']} of {document['compared']} answers" in told.err


def test_a_difference_or_nothing_to_compare_is_a_failed_check() -> None:
    NativeComparison(asked=2, compared=1, differences=()).raise_if_failed()
    with pytest.raises(CheckFailedError, match="MultimodalRunner: scene 3: answers"):
        NativeComparison(
            asked=2, compared=1, differences=("scene 3: answers 'a', and this package 'b'",)
        ).raise_if_failed()
    with pytest.raises(CheckFailedError, match="none of 2 answers can be compared"):
        NativeComparison(asked=2, compared=0, differences=()).raise_if_failed()


def test_ask_prints_the_answer_and_nothing_else(
    bundle: Bundle,
    picture: Image.Image,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "picture.png"
    picture.save(file)

    def run(arguments: list[str]) -> object:
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    command = [
        *("pocketvlm", "ask", str(bundle.path), "--image", str(file), "--prompt", "What?"),
        *("--runtime", "executorch", "--max-new-tokens", "4"),
    ]
    assert run(command) == 0
    spoken = capfd.readouterr()
    assert not spoken.err
    assert run([*command, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert spoken.out.strip() == printable(document["text"]).strip()
    assert len(document["token_ids"]) == 4
    one = document["timings"]
    assert run([*command, "--image", str(file)]) == 0
    spoken = capfd.readouterr()
    assert run([*command, "--image", str(file), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert spoken.out.strip() == printable(document["text"]).strip()
    assert document["timings"]["visual_tokens"] == 2 * one["visual_tokens"]
    long = "word " * CAPACITY
    for options in ([], ["--json"]):
        assert run([*command, *options, "--prompt", long]) == 2
        assert "of them for 1 picture; allowed are" in capfd.readouterr().err


def test_limits_are_told(bundle: Bundle, runner: ExecutorchRunner) -> None:
    assert runner.capacity == CAPACITY
    rows = runner.embed([7] * (CAPACITY + 1))
    with pytest.raises(InputError, match=f"needs {CAPACITY + 1} rows"):
        runner.decode(rows, np.arange(CAPACITY + 1)[None])
    with pytest.raises(InputError, match="runtime is 'tflite'; allowed are onnx, executorch"):
        choose_engine(bundle, "tflite")
    assert choose_engine(bundle) == "onnx"
    alone = replace(
        bundle,
        manifest=replace(
            bundle.manifest,
            components=tuple(c for c in bundle.manifest.components if c.target == "executorch"),
        ),
    )
    assert choose_engine(alone) == "executorch"
    with pytest.raises(BundleError, match="no decoder graph for target 'onnx'"):
        choose_engine(alone, "onnx")
