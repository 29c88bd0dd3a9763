"""The measurement of one process: what a worker sends, and what figures are computed from."""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.reports.measurement import Memory, Prompt

__all__ = ["AnswerTimes", "Block"]


@dataclass(frozen=True, kw_only=True)
class AnswerTimes:
    """One answer, in milliseconds.

    Attributes:
        preprocess_ms: Encoded bytes to pixels; `None` without a picture.
        vision_ms: Pixels to visual tokens, token reduction included; `None` without a picture.
        tokenize_ms: Message to token ids, and their layout.
        embed_ms: Token ids to the rows that are prefilled.
        prefill_ms: Those rows to the first logits.
        decode_ms: Embedding and running each further token.
        sample_ms: Choosing each token.
        detokenize_ms: Turning each token into text.
        ttft_user_ms: From encoded picture and text to the text of the first token.
        ttft_engine_ms: From the embedded prompt to the first token's id.
        decode_span_ms: From the first token's text to the last one's.
        prompt_tokens: Rows that were prefilled.
        new_tokens: Tokens that were generated, the first one included.
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


@dataclass(frozen=True, kw_only=True)
class Block:
    """One process: a load, a cold answer, warm-up answers, and the measured ones.

    Attributes:
        load_ms: Opening the bundle until all graphs are ready.
        prompt: The prompt in tokens of this bundle.
        cold: The first answer of the process.
        answers: The measured ones.
        memory: Resident sets of the process.
        token_ids: The cold answer.
        is_repeatable: Whether every measured answer has the same tokens.
    """

    load_ms: float
    prompt: Prompt
    cold: AnswerTimes
    answers: tuple[AnswerTimes, ...]
    memory: Memory
    token_ids: tuple[int, ...]
    is_repeatable: bool
