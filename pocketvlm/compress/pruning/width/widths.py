"""How wide the blocks become: what was asked for, as widths that kernels and stock classes take.

Rounding always removes a little more than was asked for, never less.
"""

from __future__ import annotations

import math
from typing import Literal

from pocketvlm.compress.pruning.width.channels import Widths
from pocketvlm.errors import RecipeError
from pocketvlm.models.decoder import DecoderSpec
from pocketvlm.models.spec import ModelSpec

__all__ = ["MULTIPLES", "Multiple", "choose_widths", "decoder_share", "narrow_channels"]

Multiple = Literal[32, 64]
MULTIPLES: tuple[Multiple, ...] = (32, 64)
"""Widths that int4 groups, SIMD kernels and Core ML like are multiples of these."""

# A share such as 0.3 of 10 must not miss its whole number by a float's last digit.
_SLACK = 1e-9


def narrow_channels(count: int, ratio: float, multiple_of: int, field: str) -> int:
    """Channels that are left when at least `ratio` of them goes.

    Args:
        count: Channels that there are.
        ratio: Share to remove, at least 0 and below 1; 0 keeps all, whatever their number.
        multiple_of: What the number left is a multiple of.
        field: The option, for messages.

    Raises:
        RecipeError: Less than one multiple would be left.
    """
    if ratio == 0:
        return count
    width = _whole_multiple(count * (1 - ratio), multiple_of)
    if width == 0:
        raise RecipeError(
            f"{field}: {ratio:g} of {count} channels leaves less than one multiple of "
            f"{multiple_of}; allowed is at most {1 - multiple_of / count:.3f}"
        )
    return width


def choose_widths(
    spec: ModelSpec,
    *,
    decoder_parameters: float | None,
    ffn_ratio: float,
    kv_groups: int | None,
    tower_ffn_ratio: float,
    multiple_of: int,
) -> Widths:
    """The widths of all blocks.

    A share of the decoder's parameters is taken from the FFN. KV groups go only where that cannot
    give enough, and then as few as possible: a decoder misses whole groups far more than FFN
    channels of the same weight (docs/methods/structured_width.md).

    Args:
        spec: The model.
        decoder_parameters: Share of the weights of the decoder's blocks that is removed, or
            `None` where the next two say.
        ffn_ratio: Share of the decoder's FFN channels that is removed.
        kv_groups: KV groups that are kept; `None` for all, or for what `decoder_parameters` needs.
        tower_ffn_ratio: Share of the tower's FFN channels that is removed.
        multiple_of: What numbers of channels are multiples of.

    Raises:
        RecipeError: A width is not possible; the message says what is.
    """
    decoder = spec.decoder
    if kv_groups is not None and not 1 <= kv_groups <= decoder.kv_heads:
        raise RecipeError(
            f"kv_groups: {kv_groups} cannot be kept of {decoder.kv_heads}; allowed are 1 to "
            f"{decoder.kv_heads}"
        )
    if decoder_parameters is None:
        groups = decoder.kv_heads if kv_groups is None else kv_groups
        ffn = narrow_channels(decoder.ffn_size, ffn_ratio, multiple_of, "ffn_ratio")
    else:
        groups, ffn = _split(decoder, decoder_parameters, kv_groups, multiple_of)
    tower = narrow_channels(spec.tower.ffn_size, tower_ffn_ratio, multiple_of, "tower_ffn_ratio")
    return Widths(ffn=ffn, kv_groups=groups, tower_ffn=tower)


def decoder_share(spec: ModelSpec, widths: Widths, *, with_tables: bool) -> float:
    """Share of the decoder's weights that is removed, matrices alone.

    Args:
        spec: The model as it was.
        widths: What is kept.
        with_tables: Whether the embedding and the head count as the decoder's.
    """
    decoder = spec.decoder
    whole = decoder.depth * (
        decoder.kv_heads * _group_weights(decoder) + decoder.ffn_size * _channel_weights(decoder)
    )
    left = decoder.depth * (
        widths.kv_groups * _group_weights(decoder) + widths.ffn * _channel_weights(decoder)
    )
    tables = (1 if decoder.tied_head else 2) * decoder.vocab_size * decoder.hidden_size
    return (whole - left) / (whole + tables * with_tables)


def _group_weights(decoder: DecoderSpec) -> int:
    """Weights of one KV group in one block: its rows of q, k and v and its columns of o."""
    queries = decoder.heads // decoder.kv_heads
    return decoder.hidden_size * decoder.head_dim * (2 * queries + 2)


def _channel_weights(decoder: DecoderSpec) -> int:
    """Weights of one FFN channel in one block."""
    return 3 * decoder.hidden_size


def _split(
    decoder: DecoderSpec, share: float, kv_groups: int | None, multiple_of: int
) -> tuple[int, int]:
    """KV groups and FFN channels that are left once a share of a block's weights is gone."""
    queries = decoder.heads // decoder.kv_heads
    group, channel = _group_weights(decoder), _channel_weights(decoder)
    whole = decoder.kv_heads * group + decoder.ffn_size * channel
    choices = [] if kv_groups is None else [kv_groups]
    if not choices:
        # The stock class wants as many heads as divide the hidden size.
        counts = reversed(range(1, decoder.kv_heads + 1))
        choices = [count for count in counts if decoder.hidden_size % (count * queries) == 0]
    for groups in choices:
        missing = share * whole - (decoder.kv_heads - groups) * group
        if missing <= 0:
            return groups, decoder.ffn_size
        ffn = _whole_multiple(decoder.ffn_size - missing / channel, multiple_of)
        if ffn:
            return groups, ffn
    most = 1 - (choices[-1] * group + multiple_of * channel) / whole
    raise RecipeError(
        f"decoder_parameters: {share:g} cannot be removed with {choices[-1]} KV groups and an FFN "
        f"of {multiple_of} channels; allowed is at most {most:.3f}"
    )


def _whole_multiple(left: float, multiple_of: int) -> int:
    """The largest multiple that is not above `left`, at least 0."""
    return max(0, math.floor(left + _SLACK) // multiple_of * multiple_of)
