"""The program that records a bundle's answers, on this host or on another instruction set.

```text
arguments  the folder of the job: job.json, the pictures that it names; recording.npz is written
stdout     lines; one that is a JSON object with the key "event" says how far it is, the last is
           the result: {"status": "ok", "machine": {...}} or {"status": "failed", "reason": "..."}
exit       0 or 2
```

It reads pictures, writes prompts and runs graphs as an app does, and needs no torch.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketvlm.bundle import Bundle
from pocketvlm.child_process import end_with_parent
from pocketvlm.errors import InputError, PocketVLMError
from pocketvlm.export.parity.artifact_side import ArtifactSide
from pocketvlm.export.parity.metrics import Floats
from pocketvlm.export.parity.questions import Prompt, Questions
from pocketvlm.export.parity.recording import record
from pocketvlm.export.parity.recording_file import MachineRecording, write_recording
from pocketvlm.image_file import open_image
from pocketvlm.json_io import decode, read_json
from pocketvlm.machine import describe_processor, toolchain_versions
from pocketvlm.prompt.messages import Message
from pocketvlm.runtime.engines import ENGINES, choose_engine
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.text import TextCodec

__all__ = ["JOB_FILE", "RECORDING_FILE", "AskedQuestion", "RecordingJob", "main", "record_bundle"]

JOB_FILE, RECORDING_FILE = "job.json", "recording.npz"
_PACKAGES = ("numpy", "Pillow", "tokenizers", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """A question about pictures.

    Attributes:
        pictures: Names of picture files in the job's folder.
        messages: The conversation up to the question, as chat templates take it.
        follow_up: The same, answered, with another question after it.
    """

    pictures: tuple[str, ...]
    messages: tuple[Message, ...]
    follow_up: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class RecordingJob:
    """What is recorded.

    Attributes:
        bundle: The bundle's folder.
        runtime: The engine; `None` for the first that the bundle has graphs for.
        threads: Threads of the heavy graphs; `None` for the engine's own choice.
        tokens: Longest greedy answer.
        questions: The questions.
    """

    bundle: str
    runtime: str | None
    threads: int | None
    tokens: int
    questions: tuple[AskedQuestion, ...]


def record_bundle(
    job: RecordingJob, folder: Path, report: Callable[[int, str], None]
) -> tuple[MachineRecording, str]:
    """Asks a bundle on this machine.

    Args:
        job: The job.
        folder: Where its pictures are.
        report: Called with the steps done, of four, and the name of the next one.

    Returns:
        The recording, and what computed it in words.

    Raises:
        PocketVLMError: The bundle or a picture cannot be used.
    """
    bundle = Bundle.open(Path(job.bundle))
    report(0, "loading")
    target = choose_engine(bundle, job.runtime)
    runner = ENGINES[target](bundle, job.threads, bundle.manifest.generation.max_positions)
    codec, preprocessor = TextCodec.from_bundle(bundle), ImagePreprocessor.from_bundle(bundle)
    pixels: list[Floats] = []
    prompts: list[Prompt] = []
    follow_ups: list[Prompt] = []
    for question in job.questions:
        first = len(pixels)
        images = [open_image(folder / name) for name in question.pictures]
        grids = preprocessor.grids(images)
        for image, grid in zip(images, grids, strict=True):
            pixels += [tile[None] for tile in preprocessor.pixels(image, grid)]
        tiles = tuple(range(first, len(pixels)))
        for messages, written in (
            (question.messages, prompts),
            (question.follow_up, follow_ups),
        ):
            ids = codec.encode(messages, grids)
            written.append(Prompt(token_ids=tuple(ids), pictures=tiles, grids=tuple(grids)))
    if not pixels:
        raise InputError("nothing can be recorded without a question about a picture")
    questions = Questions(
        pictures=(*pixels, np.zeros_like(pixels[0])),
        prompts=tuple(prompts),
        follow_ups=tuple(follow_ups),
    )
    found = record(
        ArtifactSide(runner, bundle, questions.pictures),
        questions,
        tokens=job.tokens,
        eos_token_ids=codec.eos_token_ids,
        report=lambda done, note: report(done + 1, note),
    )
    recording = MachineRecording(
        pixels=questions.pictures, prompts=[prompt.token_ids for prompt in prompts], said=found
    )
    return recording, runner.engine


def main(arguments: Sequence[str]) -> int:
    """Does the job of a folder, and prints how it ended as the last line."""
    end_with_parent()
    folder = Path(arguments[0])
    # Native libraries may write to descriptor 1, which becomes stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as out:
        os.dup2(2, 1)

        def say(document: Mapping[str, Any]) -> None:
            out.write(json.dumps(document, allow_nan=False) + "\n")

        try:
            job = decode(RecordingJob, read_json(folder / JOB_FILE))
            recording, engine = record_bundle(
                job, folder, lambda done, note: say({"event": "step", "done": done, "note": note})
            )
            write_recording(folder / RECORDING_FILE, recording)
        except PocketVLMError as error:
            say({"status": "failed", "reason": str(error)})
            return 2
        except Exception as error:  # noqa: BLE001  (the host must learn the reason)
            traceback.print_exc()
            say({"status": "failed", "reason": f"{type(error).__name__}: {error}"})
            return 2
        say({"status": "ok", "machine": _describe_machine(engine)})
    return 0


def _describe_machine(engine: str) -> dict[str, Any]:
    return {
        **describe_processor(),
        "engine": engine,
        "python": platform.python_version(),
        "packages": toolchain_versions(_PACKAGES),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
