"""Which bytes of a program are masked weights, found by the digests that the file itself names.

XNNPACK's serializer names every constant by the sha256 of its bytes, so a layer's bytes need only
be made again, as the kernel stores them, to find where they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocketvlm.export.executorch.file import read_layout
from pocketvlm.export.executorch.forms import integer_matrix
from pocketvlm.export.executorch.layers import pack_nibbles
from pocketvlm.export.sparse_container.pack import MaskedPlace
from pocketvlm.export.sparse_container.unmasked import unmasked
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.nonzeros import AffineNonzeros
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["MaskedProgram", "find_masked"]

_NARROW, _WORD = 4, 32


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedProgram:
    """The masked weights of a program.

    Attributes:
        places: Where they lie.
        missing: Layers of which some bytes were not found, so that these are stored as they are.
    """

    places: tuple[MaskedPlace, ...]
    missing: tuple[str, ...]


def find_masked(data: bytes, forms: Mapping[str, WeightForm]) -> MaskedProgram:
    """Finds masked weights in a program.

    Args:
        data: A `.pte` file.
        forms: Weights by the name of their layer.

    Raises:
        ExportError: It is no program.
    """
    layout = read_layout(data)
    places: list[MaskedPlace] = []
    missing: list[str] = []
    for name, form in forms.items():
        if not isinstance(form, SparseWeight):
            continue
        for stored, place in _constants(name, form):
            segment = layout.named.get(hashlib.sha256(stored.numpy().tobytes()).hexdigest())
            if segment is None:
                missing.append(name)
                break
            start = layout.base + layout.segments[segment].offset
            places.append(replace(place, start=start))
    return MaskedProgram(places=tuple(places), missing=tuple(missing))


def _constants(name: str, form: SparseWeight) -> Iterator[tuple[Tensor, MaskedPlace]]:
    """The constants that a kernel stores of a layer, and what is known of each."""
    plain = unmasked(form)
    if not isinstance(plain, AffineWeight) or not isinstance(form.values, AffineNonzeros):
        yield form.dequantize(), MaskedPlace(start=0, form=form, bits=_WORD)
        return
    matrix = integer_matrix(name, plain)
    # A weight that is zero everywhere has the fills in the place of codes.
    nothing = integer_matrix(name, _zero_like(plain))
    for digit, fill in zip(matrix.digits, nothing.digits, strict=True):
        stored = pack_nibbles(digit) if matrix.bits == _NARROW else digit
        fills = fill[:, :: matrix.group_size].to(torch.int16)
        fills = fills + 8 if matrix.bits == _NARROW else fills & 255
        yield (
            stored.contiguous(),
            MaskedPlace(
                start=0,
                form=form,
                bits=matrix.bits,
                width=digit.shape[1],
                fills=fills.to(torch.uint8),
            ),
        )


def _zero_like(form: AffineWeight) -> AffineWeight:
    codes = form.zero_points().repeat_interleave(form.group_size, dim=1)
    return AffineWeight.from_codes(
        codes,
        form.scales,
        form.zeros,
        bits=form.bits,
        group_size=form.group_size,
        in_features=form.in_features,
    )
