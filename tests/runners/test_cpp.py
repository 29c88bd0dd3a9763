"""The C++ runner answers as the Python runtime does, token by token."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.controller.prompts import render_turns
from pocketvlm.device_bench.controller.shown import show_pictures
from pocketvlm.device_bench.protocol import (
    AnswerEvent,
    BlockJob,
    EnvironmentJob,
    Event,
    Failure,
    LoadedEvent,
    SensorsEvent,
    SensorsJob,
    Turn,
)
from pocketvlm.device_bench.runner.measure import measure_block
from pocketvlm.device_bench.transports.host import HostTransport
from pocketvlm.image_file import open_image
from pocketvlm.json_io import decode
from pocketvlm.reports.measurement import Environment
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.onnx.engine import onnxruntime
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.runner import PREFILL_PIECE_ROWS
from pocketvlm.runtime.text import TextCodec, user_message
from pocketvlm.runtime.vision import ANY_VISION, VisionChoice, open_vision
from tests.runners.conftest import GRAPHS, LIBRARY, REFERENCE, SOURCE, TINY

Runner = tuple[str, ...]
Maker = Callable[[str], Bundle]
TOKENS = 32


def run(runner: Runner, *words: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*runner, *map(str, words)], capture_output=True, check=False)


def arguments(turns: Sequence[Turn], files: Sequence[Path]) -> list[object]:
    words: list[object] = []
    for turn in turns:
        for index in turn.pictures:
            words += ["--image", files[index]]
        words += ["--rendered", turn.rendered]
    return words


def asking(vision: VisionChoice) -> list[object]:
    """The words that ask for a vision graph."""
    tokens, size = vision.visual_tokens, vision.resolution
    return [
        *(() if tokens is None else ("--visual-tokens", tokens)),
        *(() if size is None else ("--resolution", f"{size[0]}x{size[1]}")),
    ]


def assert_same_answers(
    runner: Runner,
    bundle: Bundle,
    turns: Sequence[Turn],
    files: Sequence[Path],
    vision: VisionChoice = ANY_VISION,
) -> None:
    """Both runtimes hold the conversation and say the same, with the same use of the cache."""
    rendered = render_turns(TextCodec.from_bundle(bundle), turns)
    words = [*arguments(rendered, files), "--max-new-tokens", TOKENS, "--json", *asking(vision)]
    done = run(runner, bundle.path, *words)
    assert done.returncode == 0, done.stderr
    conversation = Conversation(bundle)
    lines = done.stdout.decode().splitlines()
    for turn, line in zip(turns, lines, strict=True):
        images = [files[index] for index in turn.pictures]
        expected = conversation.ask(turn.text, images, vision=vision, max_new_tokens=TOKENS)
        found = json.loads(line)
        assert tuple(found["token_ids"]) == expected.token_ids
        assert found["text"] == expected.text
        assert found["stop_reason"] == expected.stop_reason
        assert found["prompt_tokens"] == expected.timings.prompt_tokens
        assert found["reused_tokens"] == expected.timings.reused_tokens


@pytest.mark.parametrize("name", REFERENCE)
def test_conversations_with_reference_models(
    name: str, runner: Runner, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    bundle = make_bundle(name)
    about = Turn(text="What colour is the circle?", pictures=(0,))
    count = Turn(text="how many squares, it's 12345?\n\n  <image> <|im_end|>")
    compare = Turn(text="which is larger?", pictures=(1, 2))
    assert_same_answers(runner, bundle, (about, count, compare), pictures)
    assert_same_answers(runner, bundle, (compare, about), pictures[::-1])


def test_a_long_prompt_runs_in_the_pieces_of_the_python_runner(
    runner: Runner, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    bundle = make_bundle("pocket-llava")
    turns = (Turn(text="What colour is the circle? " * 40, pictures=(0,)), Turn(text="and now?"))
    codec = TextCodec.from_bundle(bundle)
    rows = len(codec.encode([user_message(turns[0].text, images=1)]))
    assert rows > 2 * PREFILL_PIECE_ROWS
    assert_same_answers(runner, bundle, turns, pictures)


@pytest.mark.parametrize("name", TINY)
def test_conversations_with_models_of_other_shapes(
    name: str, runner: Runner, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    first = Turn(text="what?", pictures=(3,))
    turns = (first,) if name == "paligemma" else (first, Turn(text="and this: ß 漢字"))
    assert_same_answers(runner, make_bundle(name), turns, pictures)


@pytest.mark.parametrize(
    "vision",
    [
        ANY_VISION,
        VisionChoice(visual_tokens=4),
        VisionChoice(resolution=(96, 32)),
        VisionChoice(visual_tokens=3, resolution=(96, 32)),
    ],
    ids=lambda vision: str(vision) or "any",
)
def test_a_picture_is_seen_by_the_graph_that_python_takes(
    vision: VisionChoice, runner: Runner, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    """Pictures of several ratios in one conversation: each has its own placeholders and grid."""
    bundle = make_bundle(GRAPHS)
    turns = (
        Turn(text="what?", pictures=(3, 2)),
        Turn(text="and this?", pictures=(1,)),
        Turn(text="which?"),
    )
    assert_same_answers(runner, bundle, turns, pictures, vision)
    shown = show_pictures(bundle, [file.read_bytes() for file in pictures], vision)
    assert len({picture.vision for picture in shown}) == (2 if vision == ANY_VISION else 1)
    mark = bundle.manifest.prompt.image_mark or bundle.manifest.prompt.image_token
    words = [word for file in pictures for word in ("--image", file, "--rendered", mark)]
    done = run(runner, bundle.path, *words, *asking(vision), "--pixels")
    graphs = open_vision(bundle)
    expected = [
        graphs[picture.vision].preprocessor.pixels(open_image(file))
        for picture, file in zip(shown, pictures, strict=True)
    ]
    np.testing.assert_array_equal(
        np.frombuffer(done.stdout, np.float32), np.concatenate([one.ravel() for one in expected])
    )


def test_a_job_names_the_vision_graph(
    runner: Runner, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    turns = [Turn(text="what?", pictures=(0, 1))]
    job = make_job(make_bundle(GRAPHS), turns, pictures[:2])
    counts = []
    for vision in (ANY_VISION, VisionChoice(visual_tokens=4)):
        asked = replace(job, vision=vision)
        with HostTransport(command=runner).connect() as connection:
            result = connection.run(asked, timeout_s=120)
        assert not isinstance(result, Failure), result.reason
        block, expected = decode(Block, result), measure_block(asked, threads=1)
        assert block.token_ids == expected.token_ids
        assert block.prompt.tokens == expected.prompt.tokens
        counts.append(block.prompt.visual_tokens)
    assert counts == [16, 8]
    with HostTransport(command=runner).connect() as connection:
        result = connection.run(replace(job, vision=VisionChoice(visual_tokens=5)), timeout_s=120)
    assert isinstance(result, Failure)
    assert "no vision graph for 5 visual tokens; this bundle has 8 visual tokens" in result.reason


def make_job(bundle: Bundle, turns: Sequence[Turn], files: Sequence[Path]) -> BlockJob:
    return BlockJob(
        bundle=str(bundle.path),
        runtime="onnx",
        turns=render_turns(TextCodec.from_bundle(bundle), turns),
        pictures=tuple(base64.b64encode(file.read_bytes()).decode() for file in files),
        new_tokens=TOKENS,
        warm_ups=2,
        answers=2,
        sustained_s=0.01,
        threads=1,
    )


def test_a_job_gives_a_block_with_the_tokens_of_the_python_runner(
    runner: Runner, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    question = Turn(text="What is left of the square?", pictures=(0, 1))
    job = make_job(make_bundle("pocket-smol"), [question], pictures[:2])
    events: list[Event] = []
    with HostTransport(command=runner).connect() as connection:
        result = connection.run(job, timeout_s=120, on_event=events.append)
    assert not isinstance(result, Failure), result.reason
    block = decode(Block, result)
    expected = measure_block(job, threads=1)
    assert block.token_ids == expected.token_ids
    assert len(block.token_ids[0]) == TOKENS
    assert block.is_repeatable
    assert block.prompt.text_tokens == expected.prompt.text_tokens
    assert block.prompt.visual_tokens == expected.prompt.visual_tokens
    assert block.cold.prompt_tokens == expected.cold.prompt_tokens
    assert len(block.answers) == 2
    assert len(block.sustained) == 1
    for times in (block.cold, *block.answers):
        assert len(times.decode_ms) == TOKENS - 1
        assert len(times.sample_ms) == len(times.detokenize_ms) == TOKENS
        stages = (times.preprocess_ms, times.vision_ms, times.tokenize_ms, times.embed_ms)
        first = sum(filter(None, stages)) + times.prefill_ms
        first += times.sample_ms[0] + times.detokenize_ms[0]
        assert times.ttft_user_ms == pytest.approx(first)
    memory = block.memory
    assert memory.counter == "VmHWM"
    assert memory.before_load_rss_bytes is not None
    assert memory.after_load_rss_bytes is not None
    assert memory.peak_rss_bytes is not None
    assert memory.before_load_rss_bytes < memory.after_load_rss_bytes <= memory.peak_rss_bytes
    phases = (memory.peak_prefill_rss_bytes, memory.peak_decode_rss_bytes)
    assert all(memory.before_load_rss_bytes < peak <= memory.peak_rss_bytes for peak in phases)
    assert [type(event) for event in events if not isinstance(event, SensorsEvent)] == [
        LoadedEvent,
        *[AnswerEvent] * 5,
    ]
    answers = [event for event in events if isinstance(event, AnswerEvent)]
    kinds = [event.kind for event in answers]
    assert kinds == ["cold", "warm_up", "measured", "measured", "sustained"]
    assert all(one.at_ms < later.at_ms for one, later in pairwise(answers))
    assert tuple(event.times for event in answers[2:4]) == block.answers


def test_later_turns_of_a_job_reuse_the_cache(
    runner: Runner, make_bundle: Maker, pictures: Sequence[Path]
) -> None:
    turns = (Turn(text="what is it?", pictures=(0,)), Turn(text="and its colour?"))
    job = make_job(make_bundle("pocket-llava"), turns, pictures[:1])
    with HostTransport(command=runner).connect() as connection:
        result = connection.run(job, timeout_s=120)
    assert not isinstance(result, Failure), result.reason
    block = decode(Block, result)
    assert block.token_ids == measure_block(job, threads=1).token_ids
    assert [len(tokens) for tokens in block.token_ids] == [TOKENS, TOKENS]
    ((later, _),) = block.later_turns
    assert later.preprocess_ms is None
    assert later.reused_tokens > block.cold.prompt_tokens
    assert {answer.turn for answer in block.sustained} == {0, 1}


def test_the_device_describes_itself(runner: Runner) -> None:
    with HostTransport(command=runner).connect() as connection:
        found = connection.run(EnvironmentJob(threads=1), timeout_s=60)
        sensors = connection.run(SensorsJob(), timeout_s=60)
    assert not isinstance(found, Failure)
    environment = decode(Environment, found)
    assert environment.threads == 1
    assert environment.memory_read_bytes_s is not None
    assert environment.memory_read_bytes_s > 1e8
    assert environment.facts["toolchain"]["onnxruntime"] == onnxruntime.__version__
    assert not isinstance(sensors, Failure)
    assert "temperature_c" in sensors


def test_a_folder_with_the_runner_is_one_for_bench(runner: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "a runner's folder"
    folder.mkdir()
    built = Path(runner[0]).parent
    for file in (SOURCE / "run", built / "pocketvlm-runner", built / "libpocketvlm.so", LIBRARY):
        shutil.copy(file, folder)
    with HostTransport.parse("", folder).connect() as connection:
        found = connection.run(EnvironmentJob(threads=1), timeout_s=60)
    assert not isinstance(found, Failure), found.reason
    assert found["toolchain"]["onnxruntime"] == onnxruntime.__version__


def save_odd_pictures(folder: Path) -> list[Path]:
    """Files that decoders treat each in its own way: turned, grey, transparent, sixteen bits."""
    rng = np.random.default_rng(1)
    color = Image.fromarray(rng.integers(0, 256, (37, 53, 3), np.uint8)).resize((211, 149))
    alpha = Image.fromarray(rng.integers(0, 256, (149, 211), np.uint8))
    files: list[Path] = []

    def save(picture: Image.Image, name: str, **options: object) -> None:
        picture.save(folder / name, **options)
        files.append(folder / name)

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        save(color, f"turned-{orientation}.jpg", exif=exif, quality=83)
    save(color, "turned.png", exif=exif)
    save(color, "progressive.jpg", progressive=True, subsampling="4:2:0")
    save(color, "full.jpg", subsampling="4:4:4", quality=97)
    save(color.convert("L"), "grey.jpg")
    save(color.convert("L"), "grey.png")
    save(color.convert("1"), "bits.png")
    save(color.quantize(31), "palette.png")
    save(color.quantize(31), "clear-palette.png", transparency=3)
    transparent = color.copy()
    transparent.putalpha(alpha)
    save(transparent, "transparent.png")
    save(transparent.convert("LA"), "transparent-grey.png")
    save(color, "keyed.png", transparency=color.getpixel((0, 0)))
    deep = rng.integers(0, 65536, (149, 211)).astype(np.uint16)
    save(Image.fromarray(deep), "deep.png")
    save(Image.fromarray(deep // 300), "shallow.png")
    return files


@pytest.mark.parametrize("name", [*REFERENCE, *TINY])
def test_pixels_are_those_of_pillow_bit_for_bit(
    name: str, runner: Runner, make_bundle: Maker, pictures: Sequence[Path], tmp_path: Path
) -> None:
    bundle = make_bundle(name)
    files = [*pictures, *(save_odd_pictures(tmp_path) if name == "pocket-llava" else ())]
    preprocessor = ImagePreprocessor.from_bundle(bundle)
    expected = [preprocessor.pixels(open_image(file)) for file in files]
    if name.endswith("-empty"):
        grids = preprocessor.grids([open_image(file) for file in files])
        assert any(grid.left_out for grid in grids)
        assert any(len(grid.seen) > 1 for grid in grids)
    mark = bundle.manifest.prompt.image_mark or bundle.manifest.prompt.image_token
    words = [word for file in files for word in ("--image", file, "--rendered", mark)]
    done = run(runner, bundle.path, *words, "--pixels")
    assert done.returncode == 0, done.stderr
    found = np.frombuffer(done.stdout, np.float32)
    ends = np.cumsum([pixels.size for pixels in expected])
    assert found.size == ends[-1]
    for file, own, other in zip(files, np.split(found, ends[:-1]), expected, strict=True):
        np.testing.assert_array_equal(own, other.ravel(), err_msg=file.name)
