"""What a turn returns: the answer, why it ended, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Literal

__all__ = ["Answer", "StageClock", "StopReason", "Timings"]

StopReason = Literal["end", "max_new_tokens", "capacity"]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Wall-clock time of one turn, stage by stage, in milliseconds.

    Attributes:
        preprocess_ms: Picture to pixels, the reading of its file included.
        vision_ms: Pixels to visual tokens.
        tokenize_ms: Messages to token ids.
        prefill_ms: New rows embedded and run, until the first logits.
        decode_ms: One entry for each further token: embedded and run.
        sample_ms: Choice of all tokens.
        detokenize_ms: Tokens to text.
        prompt_tokens: Rows that the prefill ran, visual ones included.
        visual_tokens: Those of them that came from a picture.
        reused_tokens: Rows that the KV cache held already.
    """

    preprocess_ms: float
    vision_ms: float
    tokenize_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]
    sample_ms: float
    detokenize_ms: float
    prompt_tokens: int
    visual_tokens: int
    reused_tokens: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One finished turn.

    Attributes:
        text: The answer, spaces at both ends removed.
        token_ids: Its tokens, without the one that ended it.
        stop_reason: `end` of the answer, `max_new_tokens` reached, or no `capacity` left.
        rewound_rows: Rows of KV cache that were dropped because the rendered conversation
            differs from them: the chat template writes the past otherwise than it was generated,
            or the turn before was abandoned. 0 where the cache was only extended.
        timings: Where the time went.
    """

    text: str
    token_ids: tuple[int, ...]
    stop_reason: StopReason
    rewound_rows: int
    timings: Timings


class StageClock:
    """Collects the time between laps by stage, in milliseconds."""

    def __init__(self) -> None:
        self._laps: dict[str, list[float]] = {}
        self._last = perf_counter()

    def lap(self, stage: str) -> None:
        """Counts the time since the last lap towards a stage."""
        now = perf_counter()
        self._laps.setdefault(stage, []).append((now - self._last) * 1000)
        self._last = now

    def skip(self) -> None:
        """Counts the time since the last lap towards nothing: the caller had it."""
        self._last = perf_counter()

    def laps(self, stage: str) -> tuple[float, ...]:
        """What a stage took, one entry per lap."""
        return tuple(self._laps.get(stage, ()))

    def timings(self, *, prompt_tokens: int, visual_tokens: int, reused_tokens: int) -> Timings:
        """Everything measured so far."""
        total = {stage: sum(laps) for stage, laps in self._laps.items()}
        return Timings(
            preprocess_ms=total.get("preprocess", 0.0),
            vision_ms=total.get("vision", 0.0),
            tokenize_ms=total["tokenize"],
            prefill_ms=total["embed"] + total["prefill"],
            decode_ms=self.laps("decode"),
            sample_ms=total["sample"],
            detokenize_ms=total.get("detokenize", 0.0),
            prompt_tokens=prompt_tokens,
            visual_tokens=visual_tokens,
            reused_tokens=reused_tokens,
        )
