"""A recording as a file of arrays, in which it comes back from the machine that made it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketvlm.errors import CheckFailedError
from pocketvlm.export.parity.artifact_side import Features
from pocketvlm.export.parity.metrics import Floats
from pocketvlm.export.parity.recording import Recording

__all__ = ["MachineRecording", "read_recording", "write_recording"]

_Arrays = Mapping[str, Sequence[npt.NDArray[np.generic]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class MachineRecording:
    """What a machine made of the questions, and what it said.

    Attributes:
        pixels: float32 [1, C, S, S] each, tile by tile; the last is blank.
        prompts: Token ids of each question.
        said: The answers.
    """

    pixels: Sequence[Floats]
    prompts: Sequence[tuple[int, ...]]
    said: Recording


def write_recording(file: Path, found: MachineRecording) -> None:
    """Writes a recording to a file."""
    said = found.said
    arrays: _Arrays = {
        "pixels": found.pixels,
        "prompts": [np.asarray(ids) for ids in found.prompts],
        "embeds": [features.embeds for features in said.features],
        "indices": [features.indices for features in said.features],
        "embedding": [said.embedding],
        "answers": [np.asarray(answer) for answer in said.answers],
        "logits": said.logits,
        "swapped": said.swapped,
        "swapped_of": [np.asarray(said.swapped_of)],
        "chain": said.chain,
        "at_once": said.at_once,
        "in_two": said.in_two,
    }
    named = {
        f"{name}.{number}": array
        for name, several in arrays.items()
        for number, array in enumerate(several)
    }
    with file.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **named)


def read_recording(file: Path) -> MachineRecording:
    """Reads what `write_recording` wrote.

    Raises:
        CheckFailedError: The file is missing, damaged or not complete.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return _assemble({name: stored[name] for name in stored.files})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckFailedError(f"{file.name}: is not a whole recording: {error}") from error


def _assemble(named: Mapping[str, npt.NDArray[np.generic]]) -> MachineRecording:
    def several(name: str) -> list[npt.NDArray[np.generic]]:
        count = sum(known.partition(".")[0] == name for known in named)
        return [named[f"{name}.{number}"] for number in range(count)]

    def floats(name: str) -> list[Floats]:
        return [array.astype(np.float32, copy=False) for array in several(name)]

    def ids(name: str) -> list[tuple[int, ...]]:
        return [tuple(map(int, array)) for array in several(name)]

    (embedding,), (swapped_of,) = floats("embedding"), ids("swapped_of")
    features = [
        Features(embeds=embeds, indices=indices.astype(np.int64, copy=False))
        for embeds, indices in zip(floats("embeds"), several("indices"), strict=True)
    ]
    said = Recording(
        features=features,
        embedding=embedding,
        answers=ids("answers"),
        logits=floats("logits"),
        swapped=floats("swapped"),
        swapped_of=swapped_of,
        chain=floats("chain"),
        at_once=floats("at_once"),
        in_two=floats("in_two"),
    )
    return MachineRecording(pixels=floats("pixels"), prompts=ids("prompts"), said=said)
