"""The measurement of one process: what a runner sends, and what figures are computed from."""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.reports.measurement import Energy, Memory, Prompt

__all__ = ["AnswerTimes", "Block", "SensorSample", "SustainedAnswer"]


@dataclass(frozen=True, kw_only=True)
class AnswerTimes:
    """One answer, in milliseconds.

    Attributes:
        preprocess_ms: Encoded bytes to pixels; `None` where no picture was encoded.
        vision_ms: Pixels to visual tokens, token reduction included; likewise.
        tokenize_ms: Message to token ids, and their layout.
        embed_ms: Token ids to the rows that are prefilled.
        prefill_ms: Those rows to the first logits.
        decode_ms: Embedding and running each further token.
        sample_ms: Choosing each token.
        detokenize_ms: Turning each token into text.
        ttft_user_ms: From encoded picture and text to the text of the first token.
        ttft_engine_ms: From the embedded prompt to the first token's id.
        decode_span_ms: From the first token's text to the last one's.
        prompt_tokens: Rows that were prefilled, visual ones included.
        new_tokens: Tokens that were generated, the first one included.
        reused_tokens: Rows before them that the KV cache held already; 0 in a first turn.
    """

    preprocess_ms: float | None
    vision_ms: float | None
    tokenize_ms: float
    embed_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]
    sample_ms: tuple[float, ...]
    detokenize_ms: tuple[float, ...]
    ttft_user_ms: float
    ttft_engine_ms: float
    decode_span_ms: float
    prompt_tokens: int
    new_tokens: int
    reused_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class SustainedAnswer:
    """One of the answers that follow each other without a pause; its event has all of its times.

    Attributes:
        at_s: When it was complete, in seconds after the first of them began.
        turn: The turn of the conversation that it ends.
        ttft_user_ms: As in `AnswerTimes`.
        prefill_ms: Likewise.
        decode_span_ms: Likewise.
        prompt_tokens: Likewise.
        new_tokens: Likewise.
    """

    at_s: float
    turn: int
    ttft_user_ms: float
    prefill_ms: float
    decode_span_ms: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class SensorSample:
    """What the device's sensors say, `at_ms` after the runner's start; `None` for no such sensor.

    Attributes:
        temperature_c: The hottest sensor, in degrees Celsius.
        thermal_status: 0 (none) to 6 (shutdown), as Android counts.
        battery_percent: Charge of the battery.
        is_charging: Whether it is being charged, or the device runs from the mains.
    """

    at_ms: float
    temperature_c: float | None = None
    thermal_status: int | None = None
    battery_percent: float | None = None
    is_charging: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """One process: a load, a cold answer, warm-up answers, measured ones, and sustained ones.

    An answer is a whole conversation from an empty KV cache, whose later turns reuse the cache.

    Attributes:
        load_ms: Opening the bundle until all graphs are ready.
        prompt: The prompt of the first turn in tokens of this bundle.
        cold: The first turn of the first answer of the process.
        answers: The first turns of the measured answers.
        later_turns: For each turn after the first, that turn of the measured answers.
        sustained: The answers without a pause that followed, turn by turn.
        sustained_at_ms: When the first of these began, on the clock of the samples.
        sensors: Samples before the load, after it, and between answers.
        memory: Memory of the process and of those that run programs for it.
        energy: Energy of the measured answers; `None` where nothing counts it.
        token_ids: The tokens of the cold answer, by turn.
        is_repeatable: Whether every measured answer has the same tokens.
    """

    load_ms: float
    prompt: Prompt
    cold: AnswerTimes
    answers: tuple[AnswerTimes, ...]
    memory: Memory
    token_ids: tuple[tuple[int, ...], ...]
    is_repeatable: bool
    later_turns: tuple[tuple[AnswerTimes, ...], ...] = ()
    sustained: tuple[SustainedAnswer, ...] = ()
    sustained_at_ms: float | None = None
    sensors: tuple[SensorSample, ...] = ()
    energy: Energy | None = None
