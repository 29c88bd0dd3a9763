"""Packs integers of a few bits into bytes, lowest bits first: the one layout of all codes."""

from __future__ import annotations

import numpy as np

__all__ = ["pack_codes", "unpack_codes"]

_BYTE = 8


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs integers of `bits` bits along the last axis, lowest bits first, rows to whole bytes.

    Args:
        codes: Unsigned integers below 2**bits, [..., n].
        bits: Width of one code, 1 to 16.

    Returns:
        uint8, [..., ceil(n * bits / 8)].
    """
    if codes.size and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {bits} bits")
    if _BYTE % bits == 0:
        return _pack_whole(codes.astype(np.uint8, copy=False), bits)
    places = np.arange(bits).astype(_code_type(bits))
    planes = (codes[..., None].astype(places.dtype) >> places) & 1
    flat = planes.astype(np.uint8).reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return np.packbits(flat, axis=-1, bitorder="little")


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undoes `pack_codes`: uint8, or uint16 where a code is wider than a byte.

    Args:
        packed: uint8 [..., bytes].
        bits: Width of one code.
        count: Length of the last axis before packing.
    """
    if _BYTE % bits == 0:
        return _unpack_whole(packed, bits, count)
    code_type = _code_type(bits)
    planes: np.ndarray = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    planes = planes.reshape(*packed.shape[:-1], count, bits).astype(code_type, copy=False)
    codes = planes[..., 0].copy()
    for place in range(1, bits):
        codes |= planes[..., place] << place
    return codes


def _code_type(bits: int) -> type[np.uint8 | np.uint16]:
    return np.uint8 if bits <= _BYTE else np.uint16


# Codes whose width divides a byte never straddle two: no bit planes, an eighth of the memory.
def _pack_whole(codes: np.ndarray, bits: int) -> np.ndarray:
    per_byte = 8 // bits
    width = -(-codes.shape[-1] // per_byte)
    packed = np.zeros((*codes.shape[:-1], width), dtype=np.uint8)
    for place in range(per_byte):
        part = codes[..., place::per_byte]
        packed[..., : part.shape[-1]] |= part << (place * bits)
    return packed


def _unpack_whole(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    per_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], count), dtype=np.uint8)
    for place in range(per_byte):
        part = codes[..., place::per_byte]
        part[...] = (packed[..., : part.shape[-1]] >> (place * bits)) & ((1 << bits) - 1)
    return codes
