"""The pack-quantized layout of one layer, as compressed-tensors makes it and vLLM reads it.

For a matrix [O, I] of b bits in groups of g columns (the layout has no paper):

- `weight_packed` int32 [O, ceil(I * b / 32)]: the codes of one output as a bit stream along the
  input, lowest bits first; a code may straddle two words.
- `weight_scale` [O, groups]: one factor for each group.
- `weight_shape` int64 [2]: O and I.
- `weight_zero_point` int32 [ceil(O * b / 32), groups], of asymmetric layers alone: the zero points
  of one group as a bit stream along the output.

The library speaks of signed integers, and stores each plus 2**(b - 1): these are codes and zero
points as they are here. Readers compute scale[g] * (code - zero[g]).
"""

from __future__ import annotations

from collections.abc import Mapping

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

__all__ = ["from_compressed_tensors", "to_compressed_tensors"]

_WORD = 32
_PACKED, _SCALE, _SHAPE = "weight_packed", "weight_scale", "weight_shape"
_ZERO = "weight_zero_point"
_ORDER = "weight_g_idx"


def to_compressed_tensors(name: str, form: AffineWeight) -> dict[str, Tensor]:
    """The tensors of a layer in the pack-quantized layout, by their last name.

    Args:
        name: The layer, for messages.
        form: The weight, [O, I].

    Raises:
        UnsupportedError: Zero points are not integers, or the last of several groups is short.
    """
    rows, columns = form.shape
    if form.has_float_zeros:
        raise UnsupportedError(
            f"{name}: has float zero points, and the layout stores integers; quantize with "
            "zero_point: integer"
        )
    if form.groups > 1 and columns % form.group_size:
        raise UnsupportedError(
            f"{name}: {columns} columns do not divide into groups of {form.group_size}, and the "
            "layout has whole groups; choose a group size that divides them, or --layout gptq"
        )
    tensors = {
        _PACKED: pack_words(form.codes()[:, :columns], form.bits),
        _SCALE: form.scales,
        _SHAPE: torch.tensor([rows, columns]),
    }
    if form.zeros is not None:
        tensors[_ZERO] = pack_words(form.zeros.T.contiguous(), form.bits).T.contiguous()
    return tensors


def from_compressed_tensors(
    name: str, tensors: Mapping[str, Tensor], settings: AffineSettings
) -> AffineWeight:
    """The form of a layer that is stored in the layout; undoes `to_compressed_tensors`.

    Args:
        name: The layer, for messages.
        tensors: Its tensors by their last name, without the bias.
        settings: Its bits, group size and symmetry.

    Raises:
        CheckpointError: Tensors are missing, unknown, or contradict the settings.
        UnsupportedError: Columns are shuffled among groups, which no form here keeps.
    """
    if _ORDER in tensors:
        raise UnsupportedError(
            f"{name}: {_ORDER} shuffles columns among groups (actorder: group), which no runtime "
            "here can follow; quantize again with actorder: weight or none"
        )
    needed = (_PACKED, _SCALE, _SHAPE) if settings.symmetric else (_PACKED, _SCALE, _SHAPE, _ZERO)
    for key in needed:
        if key not in tensors:
            raise CheckpointError(f"{name}.{key} is missing from the weights")
    unknown = sorted(tensors.keys() - set(needed))
    if unknown:
        raise CheckpointError(f"{name}.{unknown[0]} has no place in the pack-quantized layout")
    for key in (_PACKED, _ZERO):
        if key in tensors and tensors[key].dtype != torch.int32:
            raise CheckpointError(f"{name}.{key} is {tensors[key].dtype}, not torch.int32")
    bits, (rows, columns) = settings.bits, _stored_shape(name, tensors[_SHAPE])
    group_size = columns if settings.group_size == WHOLE_ROW else settings.group_size
    groups = -(-columns // group_size)
    check_shape(name, _PACKED, tensors[_PACKED], (rows, -(-columns * bits // _WORD)))
    check_shape(name, _SCALE, tensors[_SCALE], (rows, groups))
    if groups * group_size != columns:
        raise CheckpointError(f"{name}: groups of {group_size} do not divide {columns} columns")
    zeros = None
    if not settings.symmetric:
        check_shape(name, _ZERO, tensors[_ZERO], (-(-rows * bits // _WORD), groups))
        zeros = unpack_words(tensors[_ZERO].T.contiguous(), bits, rows).T.contiguous()
    return AffineWeight.from_codes(
        unpack_words(tensors[_PACKED], bits, columns),
        as_float16(tensors[_SCALE], f"{name}.{_SCALE}").contiguous(),
        zeros,
        bits=bits,
        group_size=group_size,
        in_features=columns,
    )


def _stored_shape(name: str, stored: Tensor) -> tuple[int, int]:
    if tuple(stored.shape) != (2,) or stored.is_floating_point() or int(stored.min()) < 1:
        raise CheckpointError(f"{name}.{_SHAPE} is not the number of outputs and of inputs")
    rows, columns = stored.tolist()
    return rows, columns
