"""Little-endian bit streams in words of 32 bits: how these layouts store integers of a few bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pocketvlm.errors import CheckpointError
from pocketvlm.weights.bitpack import pack_codes, unpack_codes

__all__ = ["as_float16", "check_shape", "pack_words", "unpack_words"]

_WORD_BYTES = 4


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Packs integers below 2**bits along the last axis, lowest bits first, zeros after the last.

    Args:
        codes: Unsigned integers [..., n].
        bits: Width of one, 1 to 16; a value may straddle two words.

    Returns:
        int32 [..., ceil(n * bits / 32)].
    """
    packed = pack_codes(codes.numpy(), bits)
    short = -packed.shape[-1] % _WORD_BYTES
    whole = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, short)])
    words = np.ascontiguousarray(whole).view(np.dtype("<i4"))
    return torch.from_numpy(words.astype(np.int32, copy=False))


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Undoes `pack_words`: int64 [..., count]."""
    stream = np.ascontiguousarray(words.numpy().astype(np.dtype("<i4"), copy=False))
    packed = stream.view(np.uint8)[..., : -(-count * bits // 8)]
    return torch.from_numpy(unpack_codes(packed, bits, count).astype(np.int64))


def as_float16(values: Tensor, what: str) -> Tensor:
    """The same values as float16, which is what forms store.

    Raises:
        CheckpointError: A value is not exact in float16.
    """
    narrow = values.to(torch.float16)
    if not torch.equal(narrow.to(torch.float32), values.to(torch.float32)):
        raise CheckpointError(
            f"{what} holds {values.dtype} values that are not exact in float16, in which scales "
            "and centroids are kept here"
        )
    return narrow


def check_shape(name: str, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Refuses a stored tensor whose shape is not the one that its layer's settings say.

    Raises:
        CheckpointError: It has another one.
    """
    if tuple(tensor.shape) != expected:
        raise CheckpointError(
            f"{name}.{key} is {tuple(tensor.shape)}, and its bits and group size say {expected}"
        )
