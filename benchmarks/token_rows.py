"""Rows of `token_reduction.py`: one method on one model, with the credit of every question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["ENGINES", "Row", "append_row", "read_rows", "rows_file", "undisturbed"]

ENGINES = ("onnx", "torch")
"""What answers: the bundle, or the float model in torch."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one share of the tokens, answered and timed by its bundle.

    Attributes:
        model: Name of the reference model.
        label: What was done, in words.
        share: The share that was asked for.
        stages: The same as stages.
        keep: Visual tokens of one tile, k.
        of: All of them, N.
        seed: Seed of the held-out questions.
        n: Number of the questions.
        credits: Credit of each question, in order.
        kinds: Kind of each question.
        blind: Accuracy when pictures are noise; measured for all tokens alone.
        seconds: Time for export, answers and timing.
        ttft_user_ms: One entry per timed answer, none where torch answered: picture file and text
            to the first token's text.
        whole_ttft_user_ms: The same of the bundle with all tokens, in the same rounds.
        vision_ms: Likewise, pixels to visual tokens.
        prefill_ms: Likewise, rows to logits.
        prompt_rows: Rows of the timed prompt.
        cache_bytes: Bytes of KV cache that they take.
    """

    model: str
    label: str
    share: float
    stages: tuple[Mapping[str, Any], ...]
    keep: int
    of: int
    seed: int
    n: int
    credits: tuple[float, ...]
    kinds: tuple[str | None, ...]
    blind: float | None
    seconds: float
    ttft_user_ms: tuple[float, ...] = ()
    whole_ttft_user_ms: tuple[float, ...] = ()
    vision_ms: tuple[float, ...] = ()
    prefill_ms: tuple[float, ...] = ()
    prompt_rows: int = 0
    cache_bytes: int = 0

    @property
    def accuracy(self) -> float:
        """Mean credit."""
        return sum(self.credits) / self.n

    @property
    def ttft_ratio(self) -> float:
        """Time to first token as a share of that with all tokens, both undisturbed."""
        return undisturbed(self.ttft_user_ms) / undisturbed(self.whole_ttft_user_ms)


def undisturbed(samples: Sequence[float]) -> float:
    """The time that a tenth of the samples stays below: what others' work did not lengthen."""
    return sorted(samples)[len(samples) // 10]


def rows_file(folder: Path, model: str, engine: str) -> Path:
    """Where the rows of a model stand that one engine answered."""
    return folder / f"{model}.{engine}.jsonl"


def read_rows(file: Path, *, seed: int) -> list[Row]:
    """The finished rows of questions of this seed; a last line that was cut is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            document = json.loads(line)
        except json.JSONDecodeError:
            continue
        row = Row(**document)
        if row.seed == seed:
            rows.append(row)
    return rows


def append_row(file: Path, row: Row) -> None:
    """Adds a finished row; a line that was cut before it stays a separate line."""
    whole = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")
    with file.open("a") as stream:
        stream.write(f"{'' if whole else chr(10)}{json.dumps(asdict(row))}\n")
