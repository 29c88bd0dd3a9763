"""The GPTQ layout of one layer, as AutoGPTQ made it and GPTQModel, vLLM and transformers read it.

For a matrix [O, I] of b bits in groups of g columns (GPTQ: arXiv 2210.17323; the layout itself has
no paper):

- `qweight` int32 [I * b / 32, O]: the codes of one output, packed along the input.
- `qzeros` int32 [groups, O * b / 32]: zero points, packed along the output; version 2 stores them
  as they are, version 1 ("gptq") stores each minus one, which a reader adds again.
- `scales` float16 [groups, O] and `g_idx` int32 [I], the group of each column.

A code is in bits b * j and up of the stream of words, lowest first, so three-bit codes straddle
words: 32 of them in three. Readers compute scales[g] * (code - zero[g]).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.formats.bit_stream import (
    as_float16,
    check_shape,
    pack_words,
    unpack_words,
)
from pocketvlm.weights.formats.settings import WHOLE_ROW, AffineSettings

__all__ = ["from_gptq", "to_gptq"]

_WORD = 32
_TENSORS = ("qweight", "qzeros", "scales")


def to_gptq(name: str, form: AffineWeight, *, version: Literal[1, 2]) -> dict[str, Tensor]:
    """The tensors of a layer in the GPTQ layout, by their last name.

    Columns that pad the last group are not stored: `g_idx` says where a group ends.

    Args:
        name: The layer, for messages.
        form: The weight, [O, I].
        version: 1 stores zero points minus one, 2 as they are.

    Raises:
        UnsupportedError: Zero points are not integers of `bits` bits (in version 1: are zero), or
            the rows or columns do not fill whole words.
    """
    rows, columns = form.shape
    zeros = _integer_zeros(name, form, version)
    for size, what in ((columns, "in_features"), (rows, "out_features")):
        if size * form.bits % _WORD:
            raise UnsupportedError(
                f"{name}: {what} {size} at {form.bits} bits do not fill words of 32 bits, which "
                "readers of the GPTQ layout need; leave this layer float or choose other bits"
            )
    return {
        "qweight": pack_words(form.codes()[:, :columns], form.bits).T.contiguous(),
        "qzeros": pack_words((zeros.T - int(version == 1)).contiguous(), form.bits),
        "scales": form.scales.T.contiguous(),
        "g_idx": _trivial_groups(columns, form.group_size),
    }


def from_gptq(
    name: str, tensors: Mapping[str, Tensor], settings: AffineSettings, *, version: Literal[1, 2]
) -> AffineWeight:
    """The form of a layer that is stored in the GPTQ layout; undoes `to_gptq`.

    Args:
        name: The layer, for messages.
        tensors: Its tensors by their last name, without the bias.
        settings: Its bits, group size and symmetry.
        version: 1 where zero points are stored minus one.

    Raises:
        CheckpointError: Tensors are missing, unknown, or contradict the settings.
        UnsupportedError: Columns are shuffled among groups (`desc_act`), which no form here keeps,
            or a zero point has no one meaning.
    """
    for key in _TENSORS:
        if key not in tensors:
            raise CheckpointError(f"{name}.{key} is missing from the weights")
    unknown = sorted(tensors.keys() - {*_TENSORS, "g_idx"})
    if unknown:
        raise CheckpointError(f"{name}.{unknown[0]} has no place in the GPTQ layout")
    qweight, qzeros = tensors["qweight"], tensors["qzeros"]
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32:
        raise CheckpointError(f"{name}: packed words are {qweight.dtype}, not torch.int32")
    bits, rows = settings.bits, qweight.shape[1]
    columns = tensors["g_idx"].shape[0] if "g_idx" in tensors else qweight.shape[0] * _WORD // bits
    group_size = columns if settings.group_size == WHOLE_ROW else settings.group_size
    groups = -(-columns // group_size)
    check_shape(name, "qweight", qweight, (-(-columns * bits // _WORD), rows))
    check_shape(name, "qzeros", qzeros, (groups, -(-rows * bits // _WORD)))
    check_shape(name, "scales", tensors["scales"], (groups, rows))
    if "g_idx" in tensors and not torch.equal(
        tensors["g_idx"].to(torch.int32), _trivial_groups(columns, group_size)
    ):
        raise UnsupportedError(
            f"{name}: g_idx shuffles columns among groups (desc_act), which no runtime here can "
            "follow; quantize again with desc_act false"
        )
    zeros = unpack_words(qzeros, bits, rows).T
    if version == 1:
        zeros = zeros + 1
        if int(zeros.max()) == 1 << bits:
            raise UnsupportedError(
                f"{name}: a zero point is stored as {(1 << bits) - 1} in a v1 checkpoint, which "
                f"some readers take for {1 << bits} and others for 0; save it as gptq_v2"
            )
    codes = unpack_words(qweight.T.contiguous(), bits, columns)
    short = groups * group_size - columns
    if short:
        codes = torch.cat([codes, zeros[:, -1:].expand(rows, short)], dim=1)
    is_symmetric = settings.symmetric and bool((zeros == 1 << (bits - 1)).all())
    return AffineWeight.from_codes(
        codes,
        as_float16(tensors["scales"], f"{name}.scales").T.contiguous(),
        None if is_symmetric else zeros.contiguous(),
        bits=bits,
        group_size=group_size,
        in_features=columns,
    )


def _integer_zeros(name: str, form: AffineWeight, version: Literal[1, 2]) -> Tensor:
    """Zero points as int64 [O, groups], all of which the version can store."""
    if form.has_float_zeros:
        raise UnsupportedError(
            f"{name}: has float zero points, and the GPTQ layout stores integers; quantize with "
            "zero_point: integer"
        )
    zeros = form.zero_points().to(torch.int64)
    if version == 1 and int(zeros.min()) == 0:
        raise UnsupportedError(
            f"{name}: has a zero point of 0, which GPTQ v1 (stored minus one) cannot express; "
            "use --layout gptq_v2, or quantize with symmetric: true"
        )
    return zeros


def _trivial_groups(columns: int, group_size: int) -> Tensor:
    return (torch.arange(columns) // group_size).to(torch.int32)
