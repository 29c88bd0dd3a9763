"""Recordings: what is written is what is read, and a file that is not whole is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pocketvlm.errors import CheckFailedError
from pocketvlm.export.parity.agreement import compare
from pocketvlm.export.parity.artifact_side import Features
from pocketvlm.export.parity.recording import Recording
from pocketvlm.export.parity.recording_file import (
    MachineRecording,
    read_recording,
    write_recording,
)

TOKENS, VOCABULARY = 5, 11


def make_recording(seed: int = 0) -> MachineRecording:
    """Two questions about a picture each; a blank picture is the third."""
    rng = np.random.default_rng(seed)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    logits = [floats(TOKENS, VOCABULARY) for _ in range(2)]
    said = Recording(
        features=[
            Features(embeds=floats(1, 4, 8), indices=np.arange(4, dtype=np.int64)[None])
            for _ in range(3)
        ],
        embedding=floats(1, 6, 8),
        answers=[tuple(map(int, row.argmax(axis=1))) for row in logits],
        logits=logits,
        swapped=[floats(VOCABULARY) for _ in range(4)],
        swapped_of=[0, 0, 1, 1],
        chain=[row[0] for row in logits],
        at_once=(again := [floats(VOCABULARY) for _ in range(2)]),
        in_two=again,
    )
    pixels = [floats(1, 3, 8, 8) for _ in range(3)]
    return MachineRecording(pixels=pixels, prompts=[(1, 2, 3), (4, 5)], said=said)


def test_a_recording_survives_its_file(tmp_path: Path) -> None:
    written = make_recording()
    write_recording(tmp_path / "a", written)
    found = read_recording(tmp_path / "a")
    assert found.prompts == written.prompts
    assert found.said.answers == written.said.answers
    assert list(found.said.swapped_of) == list(written.said.swapped_of)
    for mine, theirs in zip(found.pixels, written.pixels, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    metrics, details = compare(found.said, written.said)
    assert metrics["chain.sqnr_db"] == metrics["two_turns.reference_sqnr_db"] == 200
    assert metrics["greedy.mismatch_share"] == 0
    assert details["greedy_tokens_equal"] == details["greedy_tokens_compared"] == 2 * TOKENS
    assert details["greedy_answers_equal"] == 2


def test_another_machine_is_told_apart() -> None:
    metrics, details = compare(make_recording(1).said, make_recording().said)
    assert metrics["chain.sqnr_db"] < 5
    assert metrics["image_swap.change_cosine"] < 0.5
    assert details["greedy_tokens_equal"] < details["greedy_tokens_compared"]
    assert details["greedy_answers_equal"] == 0


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "pickled", "incomplete"])
def test_a_file_that_is_not_whole_is_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_recording(file, make_recording())
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        file.write_bytes(b"\x00" * 100)
    elif damage == "pickled":
        with file.open("wb") as stream:
            np.savez(stream, **{"pixels.0": np.array([{}], dtype=object)})
    else:
        with file.open("wb") as stream:
            np.savez(stream, **{"pixels.1": np.zeros(3)})
    with pytest.raises(CheckFailedError, match="a: is not a whole recording: "):
        read_recording(file)
