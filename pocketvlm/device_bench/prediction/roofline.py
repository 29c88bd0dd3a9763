"""Predicts times of an answer: counted operators, each at the rate of the kernel that runs it.

A product takes what its arithmetic takes or what reading its weights takes, whichever is longer
(the roofline model; Williams, Waterman and Patterson 2009), and a fixed time for each node and each
call. Nothing runs at the same time as anything else. Rates are measured, on this host
(`prediction.calibration`) or derived from a device's profile, so a prediction is as good as they
are; every figure is labelled as predicted wherever it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pocketvlm.device_bench.prediction.decoder_work import DecoderWork, decoder_operators
from pocketvlm.device_bench.prediction.operators import (
    CachedAttention,
    Operator,
    Product,
    TowerAttention,
)
from pocketvlm.device_bench.prediction.rates import Rates
from pocketvlm.device_bench.prediction.work import ModelWork

__all__ = ["CacheType", "Question", "Times", "predict_prefill_ms", "predict_times"]

CacheType = Literal["float32", "int8"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a model.

    Attributes:
        text_rows: Rows of the prompt that are text.
        visual_rows: Rows that are of the picture.
        tiles_by_vision: Tiles that each vision graph sees, in the manifest's order; none for text
            alone.
        picture_pixels: Pixels of the encoded pictures.
        new_tokens: Tokens that are generated.
        cache: Type of the KV cache.
    """

    text_rows: int
    visual_rows: int
    tiles_by_vision: tuple[int, ...]
    picture_pixels: int
    new_tokens: int
    cache: CacheType = "float32"

    @property
    def rows(self) -> int:
        """Rows of the prompt."""
        return self.text_rows + self.visual_rows

    @property
    def tiles(self) -> int:
        """Tiles of all pictures."""
        return sum(self.tiles_by_vision)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Predicted times of one answer, as `docs/benchmarking.md` defines the figures."""

    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_engine_ms: float
    ttft_user_ms: float
    prefill_tok_s: float
    decode_tok_s: float


def predict_times(model: ModelWork, question: Question, rates: Rates) -> Times:
    """Times of an answer.

    Args:
        model: The model.
        question: What is asked.
        rates: What the device reaches.
    """
    call_ms, cache = rates.call_us / 1e3, question.cache
    preprocess_ms = question.picture_pixels / rates.decoded_pixels_s * 1e3
    vision_ms = 0.0
    for tiles, vision in zip(question.tiles_by_vision, model.visions, strict=False):
        preprocess_ms += tiles * vision.tile_pixels / rates.resized_pixels_s * 1e3
        vision_ms += tiles * (_graph_ms(vision.work.operators(), rates, cache) + call_ms)
    prefill_ms = predict_prefill_ms(
        model.decoder, rates, question.text_rows, question.visual_rows, cache=cache
    )
    halfway = question.rows + question.new_tokens // 2
    step = decoder_operators(
        model.decoder, text_rows=1, past=halfway, past_visual=question.visual_rows
    )
    decode_ms = _graph_ms(step, rates, cache) + 2 * call_ms  # the token's embedding is a graph too
    sample_ms = model.decoder.vocab_size / rates.sampled_logits_s * 1e3 + rates.token_us / 1e3
    ttft_engine_ms = prefill_ms + sample_ms
    return Times(
        preprocess_ms=preprocess_ms,
        vision_ms=vision_ms,
        prefill_ms=prefill_ms,
        decode_ms=decode_ms,
        ttft_engine_ms=ttft_engine_ms,
        ttft_user_ms=preprocess_ms + vision_ms + call_ms + ttft_engine_ms,
        prefill_tok_s=question.rows / prefill_ms * 1e3,
        decode_tok_s=1e3 / (decode_ms + sample_ms),
    )


def predict_prefill_ms(
    decoder: DecoderWork,
    rates: Rates,
    text_rows: int,
    visual_rows: int,
    *,
    cache: CacheType = "float32",
) -> float:
    """Milliseconds of the decoder's call with a whole prompt.

    Args:
        decoder: The decoder.
        rates: What the device reaches.
        text_rows: Rows of the prompt that are text.
        visual_rows: Rows that are of pictures.
        cache: Type of the KV cache.
    """
    prompt = decoder_operators(decoder, text_rows=text_rows, visual_rows=visual_rows)
    return _graph_ms(prompt, rates, cache) + rates.call_us / 1e3


def _graph_ms(operators: Iterable[Operator], rates: Rates, cache: CacheType) -> float:
    return sum(_seconds(operator, rates, cache) for operator in operators) * 1e3


def _seconds(operator: Operator, rates: Rates, cache: CacheType) -> float:
    if isinstance(operator, CachedAttention):
        found = rates.attention[cache]
        macs_s = found.row_macs_s if operator.rows == 1 else found.macs_s
        return operator.macs / macs_s + found.node_us / 1e6
    if isinstance(operator, Product):
        product = rates.product(operator.kernel)
        return product.seconds(operator.rows, operator.weights, operator.nodes)
    nodes_s = operator.nodes * rates.node_us / 1e6
    if isinstance(operator, TowerAttention):
        return operator.macs / rates.tower_macs_s + nodes_s
    elements_s = {"norm": rates.norm_elements_s, "copy": rates.copy_elements_s}.get(operator.kind)
    return operator.elements / (elements_s or rates.activation(operator.kind)) + nodes_s
