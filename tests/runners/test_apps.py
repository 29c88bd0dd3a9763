"""The runner inside apps: its C API, the bridge to Kotlin, and the sources of the samples."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.controller.prompts import render_turns
from pocketvlm.device_bench.protocol import Failure, Turn
from pocketvlm.device_bench.runner.measure import measure_block
from pocketvlm.device_bench.transports.host import HostTransport
from pocketvlm.json_io import decode
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.text import TextCodec
from pocketvlm.runtime.vision import ANY_VISION, VisionChoice
from tests.programs import give_up, require_program
from tests.runners.conftest import GRAPHS, LIBRARY, ROOT
from tests.runners.test_cpp import make_job

Runner = tuple[str, ...]
Maker = Callable[[str], Bundle]
RUNNERS = ROOT / "runners"
SAMPLES = sorted(file for file in RUNNERS.rglob("*") if file.suffix in (".swift", ".kt", ".kts"))
AHEAD = """
package dev.pocketvlm

import java.io.File

fun main(words: Array<String>) {
    val (libraries, runtime, bundle, rendered, first) = words.map { File(it) }
    Native.load(libraries)
    Conversation(bundle, runtime, 1).use {
        try {
            it.encodeAhead("no picture".toByteArray())
        } catch (error: IllegalStateException) {
            println(error.message)
        }
        it.encodeAhead(first.readBytes())
        val answer = it.ask(rendered.readText(), listOf(File(words[5]).readBytes()), 32)
        System.out.write(answer.toByteArray())
        System.out.flush()
    }
}
"""
PIECE = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)


class _Picture(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char_p), ("size", ctypes.c_size_t))


@pytest.fixture(scope="module")
def library(runner: Runner) -> ctypes.CDLL:
    """The shared library beside the runner."""
    found = ctypes.CDLL(str(Path(runner[0]).parent / "libpocketvlm.so"))
    found.pocketvlm_open.restype = ctypes.c_void_p
    for name in ("choose_vision", "reset", "close"):
        getattr(found, f"pocketvlm_{name}").argtypes = [ctypes.c_void_p]
    found.pocketvlm_encode_ahead.argtypes = [
        *(ctypes.c_void_p, ctypes.POINTER(_Picture), ctypes.POINTER(ctypes.c_char_p)),
    ]
    found.pocketvlm_ask.argtypes = [
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Picture), ctypes.c_size_t),
        *(ctypes.c_int, PIECE, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p)),
    ]
    return found


def opened(library: ctypes.CDLL, folder: Path) -> tuple[int | None, str]:
    reason = ctypes.c_char_p()
    words = (str(folder).encode(), str(LIBRARY).encode(), 1)
    handle = library.pocketvlm_open(*words, ctypes.byref(reason))
    return handle, (reason.value or b"").decode()


def ask(library: ctypes.CDLL, handle: int, rendered: str, files: Sequence[Path]) -> tuple[str, str]:
    """The answer, and the reason of a failure."""
    contents = [file.read_bytes() for file in files]
    shown = (_Picture * len(files))(*[_Picture(content, len(content)) for content in contents])
    pieces: list[bytes] = []
    reason = ctypes.c_char_p()
    library.pocketvlm_ask(
        *(handle, rendered.encode(), shown, len(files), 32),
        *(PIECE(lambda text, _: pieces.append(text)), None, ctypes.byref(reason)),
    )
    return b"".join(pieces).decode(), (reason.value or b"").decode()


def test_an_app_chooses_the_vision_graph(
    library: ctypes.CDLL, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    bundle = make_bundle(GRAPHS)
    (turn,) = render_turns(TextCodec.from_bundle(bundle), (Turn(text="what?", pictures=(0,)),))
    handle, reason = opened(library, bundle.path)
    assert handle, reason
    conversation, said = Conversation(bundle), ctypes.c_char_p()
    for vision in (ANY_VISION, VisionChoice(visual_tokens=3, resolution=(96, 32)), ANY_VISION):
        width, height = vision.resolution or (0, 0)
        wanted = (vision.visual_tokens or 0, width, height)
        assert library.pocketvlm_choose_vision(handle, *wanted, ctypes.byref(said)) == 0
        conversation.reset()
        expected = conversation.ask("what?", pictures[0], vision=vision, max_new_tokens=32)
        assert ask(library, handle, turn.rendered or "", pictures[:1]) == (expected.text, "")
        library.pocketvlm_reset(handle)
    assert library.pocketvlm_choose_vision(handle, 5, 0, 0, ctypes.byref(said)) == -1
    assert b"no vision graph for 5 visual tokens" in (said.value or b"")
    library.pocketvlm_close(handle)


def test_the_c_api_answers_as_the_python_runtime(
    library: ctypes.CDLL, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    bundle = make_bundle("pocket-llava")
    turns = (Turn(text="what is left?", pictures=(0,)), Turn(text="how many?"))
    rendered = [turn.rendered or "" for turn in render_turns(TextCodec.from_bundle(bundle), turns)]
    handle, reason = opened(library, bundle.path)
    assert handle, reason
    conversation = Conversation(bundle)
    first = conversation.ask("what is left?", pictures[0]).text
    second = conversation.ask("how many?").text
    assert ask(library, handle, rendered[0], pictures[:1]) == (first, "")
    assert ask(library, handle, rendered[1], []) == (second, "")
    _, reason = ask(library, handle, rendered[1], [])  # of a third turn, one answer is missing
    assert "places for 1 earlier answers where there are 2" in reason
    assert ask(library, handle, rendered[0], pictures[:1]) == (first, "")
    library.pocketvlm_close(handle)


def test_the_c_api_encodes_pictures_ahead(
    library: ctypes.CDLL, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    bundle = make_bundle("pocket-llava")
    (turn,) = render_turns(
        TextCodec.from_bundle(bundle), [Turn(text="what is left?", pictures=(0, 1))]
    )
    handle, reason = opened(library, bundle.path)
    assert handle, reason
    expected = Conversation(bundle).ask("what is left?", pictures[:2]).text

    def encode_ahead(content: bytes) -> tuple[int, str]:
        reason = ctypes.c_char_p()
        picture = _Picture(content, len(content))
        status = library.pocketvlm_encode_ahead(handle, ctypes.byref(picture), ctypes.byref(reason))
        return status, (reason.value or b"").decode()

    status, reason = encode_ahead(b"no picture")
    assert status == -1
    assert reason.startswith("the picture")
    assert "\n" not in reason
    assert encode_ahead(pictures[0].read_bytes()) == (0, "")
    assert ask(library, handle, turn.rendered or "", pictures[1:2]) == (expected, "")
    library.pocketvlm_close(handle)


def test_the_c_api_says_why_a_bundle_cannot_be_opened(library: ctypes.CDLL, tmp_path: Path) -> None:
    handle, reason = opened(library, tmp_path)
    assert not handle
    assert reason == f"{tmp_path}: no bundle here: manifest.json is missing"


@pytest.fixture(scope="module")
def java(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command that starts a class of the Kotlin sample, or of `AHEAD`, in a desktop's JVM."""
    for program in ("kotlinc", "java"):
        require_program(program)
    if not (Path(runner[0]).parent / "libpocketvlm-jni.so").exists():
        give_up("the bridge was not built: there are no headers of JNI")
    folder = tmp_path_factory.mktemp("kotlin")
    ahead, jar = folder / "Ahead.kt", folder / "runner.jar"
    ahead.write_text(AHEAD)
    sources = RUNNERS / "android/app/src/main/kotlin/dev/pocketvlm"
    files = [file for file in sources.glob("*.kt") if file.name != "MainActivity.kt"]
    subprocess.run(["kotlinc", *files, ahead, "-include-runtime", "-d", jar], check=True)
    return "java", "-cp", str(jar)


def test_the_kotlin_runner_does_a_job(
    java: tuple[str, ...], runner: Runner, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    options = ("--libraries", str(Path(runner[0]).parent), "--onnxruntime", str(LIBRARY))
    command = (*java, "dev.pocketvlm.RunnerKt", *options)
    job = make_job(make_bundle("pocket-llava"), [Turn(text="what?", pictures=(0,))], pictures[:1])
    with HostTransport(command=command).connect() as connection:
        result = connection.run(job, timeout_s=120)
    assert not isinstance(result, Failure), result.reason
    assert decode(Block, result).token_ids == measure_block(job, threads=1).token_ids


def test_an_app_in_kotlin_encodes_pictures_ahead(
    java: tuple[str, ...],
    runner: Runner,
    make_bundle: Maker,
    pictures: Sequence[Path],
    tmp_path: Path,
) -> None:
    bundle = make_bundle("pocket-llava")
    turn = Turn(text="what is left?", pictures=(0, 1))
    (rendered,) = render_turns(TextCodec.from_bundle(bundle), [turn])
    text = tmp_path / "rendered.txt"
    text.write_text(rendered.rendered or "", encoding="utf-8")
    words = (Path(runner[0]).parent, LIBRARY, bundle.path, text, *pictures[:2])
    ended = subprocess.run(
        (*java, "dev.pocketvlm.AheadKt", *map(str, words)), capture_output=True, check=True
    )
    refused, answer = ended.stdout.decode().split("\n", 1)
    assert refused.startswith("the picture")
    assert answer == Conversation(bundle).ask("what is left?", pictures[:2]).text


@pytest.mark.parametrize(
    "wrapper",
    ["android/app/src/main/cpp/jni.cc", "ios/Sources/PocketVLM/Conversation.swift"],
)
def test_the_samples_reach_the_whole_c_api(wrapper: str) -> None:
    called = re.compile(r"\b(pocketvlm_\w+)\(")
    header = (RUNNERS / "cpp/include/pocketvlm.h").read_text()
    found = set(called.findall((RUNNERS / wrapper).read_text()))
    assert found >= set(called.findall(header)), wrapper


def test_kotlin_declares_what_the_bridge_defines() -> None:
    android = RUNNERS / "android/app/src/main"
    declared = re.findall(
        r"external fun (\w+)", (android / "kotlin/dev/pocketvlm/Native.kt").read_text()
    )
    defined = re.findall(r"Java_dev_pocketvlm_Native_(\w+)\(", (android / "cpp/jni.cc").read_text())
    assert sorted(declared) == sorted(defined)


@pytest.mark.parametrize("file", SAMPLES, ids=lambda file: str(file.relative_to(RUNNERS)))
def test_sources_of_the_samples_are_well_formed(file: Path) -> None:
    tree_sitter = import_module("tree_sitter")
    name = "tree_sitter_swift" if file.suffix == ".swift" else "tree_sitter_kotlin"
    parser = tree_sitter.Parser(tree_sitter.Language(import_module(name).language()))

    def errors(node: Any) -> Iterator[Any]:
        if node.type == "ERROR" or node.is_missing:
            yield node.start_point
        for child in node.children:
            yield from errors(child)

    assert not list(errors(parser.parse(file.read_bytes()).root_node))
