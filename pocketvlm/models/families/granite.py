"""Granite's multipliers (arXiv 2502.09927, 2410.08985), folded into the weights of a Llama."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pocketvlm.models.blocks import BlockSpec
from pocketvlm.models.folds import Fold, Multiply
from pocketvlm.models.spec import ModelSpec

__all__ = ["granite_folds"]


def granite_folds(text: Mapping[str, Any], spec: ModelSpec) -> tuple[Fold, ...]:
    """Folds of the multipliers of a Granite decoder; none for another.

    Whatever enters the decoder is multiplied: the table, the projector's last linear and the row
    after lines. A head that is the table itself would be multiplied with it, so the last norm
    takes that back. Positions rotate queries and keep their length. `logits_scaling` belongs to the
    head of the text model alone, which stock's vision-language models replace by one without it.

    Args:
        text: `text_config` of config.json.
        spec: The model.
    """
    if text.get("model_type") != "granite":
        return ()
    return tuple(
        Multiply(target=target, factor=factor)
        for target, factor in _factors(text, spec)
        if factor != 1.0
    )


def _factors(text: Mapping[str, Any], spec: ModelSpec) -> Iterator[tuple[str, float]]:
    decoder = spec.decoder
    entering = text.get("embedding_multiplier", 1.0)
    residual = text.get("residual_multiplier", 1.0)
    queries = text.get("attention_multiplier", 1.0) * decoder.head_dim**0.5
    yield f"{decoder.embedding}.weight", entering
    if spec.line_break is not None:
        yield spec.line_break, entering
    for name in _tensors(spec, spec.projector.linears[-1]):
        yield name, entering
    for block in decoder.blocks:
        if not isinstance(block, BlockSpec):
            raise TypeError("a Granite decoder has blocks of attention alone")
        for name in _tensors(spec, block.attention.q):
            yield name, queries
        for linear in (block.attention.o, block.ffn.down):
            for name in _tensors(spec, linear):
                yield name, residual
    text.get("logits_scaling")  # read: it changes nothing
    yield f"{decoder.norm}.weight", 1.0 / entering if decoder.tied_head else 1.0


def _tensors(spec: ModelSpec, name: str) -> list[str]:
    """The weight of a linear, and its bias where it has one."""
    linear = next(linear for linear in spec.linears() if linear.name == name)
    return [f"{name}.weight", *([f"{name}.bias"] if linear.has_bias else [])]
