"""Packs weight forms into the layouts of ONNX Runtime's block-quantized operators, and back.

`MatMulNBits` and `GatherBlockQuantized` share one layout: codes lowest bits first, in blocks
along the input, zero points packed the same way, row by row. It is the layout of `AffineWeight`, so
codes of 2, 4 and 8 bits are carried over byte for byte, and a table that is both embedding and
head is stored once. 3-bit codes, which no kernel reads, are widened to 4-bit containers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor

from pocketvlm.export.onnx.limits import container_bits
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.bitpack import pack_codes, unpack_codes

__all__ = [
    "PackedWeight",
    "gathers_blocks",
    "narrowest_float",
    "pack_weight",
    "unpack_weight",
]

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """One affine weight as `MatMulNBits` reads it.

    Attributes:
        codes: uint8 [out_features, blocks, block_size * bits / 8].
        scales: float16 [out_features, blocks].
        zeros: uint8 [out_features, ceil(blocks * bits / 8)]; float16 [out_features, blocks] where
            zero points lie between codes; `None` where every zero point is 2**(bits - 1), which is
            what the operator assumes.
        bits: Width of the container of one code.
        block_size: Columns that share a scale.
        in_features: Columns without padding.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int
    block_size: int
    in_features: int

    @property
    def out_features(self) -> int:
        """Rows."""
        return int(self.scales.shape[0])


def pack_weight(forms: Sequence[AffineWeight]) -> PackedWeight:
    """Packs weights of one layout and one input width, their rows joined.

    Args:
        forms: At least one weight, of a layout that `limits.explain` does not refuse.
    """
    first = forms[0]
    bits = container_bits(first.bits)
    rows, groups = sum(form.shape[0] for form in forms), first.groups
    if bits == first.bits:
        codes = np.concatenate([form.packed.numpy() for form in forms])
    else:
        codes = np.concatenate([pack_codes(form.codes().numpy(), bits) for form in forms])
    # The zero point that the operator assumes belongs to the container, not to the code.
    is_default = all(form.zeros is None for form in forms) and bits == first.bits
    zeros = None
    if not is_default:
        points = np.concatenate([form.zero_points().numpy() for form in forms])
        zeros = points if first.has_float_zeros else pack_codes(points, bits)
    return PackedWeight(
        codes=codes.reshape(rows, groups, first.group_size * bits // 8),
        scales=np.concatenate([form.scales.numpy() for form in forms]),
        zeros=zeros,
        bits=bits,
        block_size=first.group_size,
        in_features=first.in_features,
    )


def gathers_blocks(packed: PackedWeight) -> bool:
    """Whether `GatherBlockQuantized` reads rows of a table alike in every supported version.

    Before 1.27 it has no 2-bit codes, and takes the 4-bit zero points of all rows for one row:
    where an odd number of them ends each row in half a byte, every row but the first gets those of
    others. It never takes zero points that are floats.
    """
    zeros = packed.zeros
    if packed.bits < 4:  # noqa: PLR2004  (bits)
        return False
    if zeros is None:
        return True
    return zeros.dtype == np.uint8 and packed.scales.shape[1] * packed.bits % 8 == 0


def unpack_weight(packed: PackedWeight, *, bits: int) -> AffineWeight:
    """Undoes `pack_weight`; the definition that tests hold the packer to.

    Args:
        packed: A packed weight.
        bits: Width of the codes before they were put into their container.
    """
    rows, blocks = packed.scales.shape
    flat = packed.codes.reshape(rows, -1)
    codes = unpack_codes(flat, packed.bits, blocks * packed.block_size)
    zeros = packed.zeros
    if zeros is not None and zeros.dtype == np.uint8:
        zeros = unpack_codes(zeros, packed.bits, blocks)
    return AffineWeight.from_codes(
        torch.from_numpy(codes),
        torch.from_numpy(packed.scales),
        None if zeros is None else torch.from_numpy(zeros),
        bits=bits,
        group_size=packed.block_size,
        in_features=packed.in_features,
    )


def narrowest_float(values: Tensor) -> tuple[np.ndarray, int]:
    """The values in the smallest float type that holds every one of them exactly.

    Returns:
        The array, bfloat16 as uint16, and its ONNX element type.
    """
    stored = values.detach().contiguous()
    if _is_exact(stored, torch.bfloat16):
        narrow = stored.to(torch.bfloat16)
        return narrow.view(torch.uint16).numpy(), onnx.TensorProto.BFLOAT16
    if _is_exact(stored, torch.float16):
        return stored.to(torch.float16).numpy(), onnx.TensorProto.FLOAT16
    return stored.to(torch.float32).numpy(), onnx.TensorProto.FLOAT


def _is_exact(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a float type holds all values; some at a time, as a table may be large."""
    return values.dtype == dtype or all(
        torch.equal(part.to(dtype).to(torch.float32), part.to(torch.float32))
        for part in values.reshape(-1).split(_CHUNK_ELEMENTS)
    )
