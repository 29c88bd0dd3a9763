"""What ONNX Runtime has kernels for: which integers, in which groups, with which zero points."""

from __future__ import annotations

from pocketvlm.export.precisions import describe_grid, describe_masked
from pocketvlm.stages import Explanation
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, WeightLayout

__all__ = ["BLOCK_SIZES", "container_bits", "explain"]

BLOCK_SIZES: tuple[int, ...] = (16, 32, 64, 128, 256)
"""Group sizes that the kernels take."""

_FLOAT_ZERO_BITS = (2, 4)  # containers whose kernels take zero points that are floats
_NARROW_BITS = 2


def container_bits(bits: int) -> int:
    """Bits in which ONNX Runtime stores a code of `bits` bits."""
    return 4 if bits == 3 else bits  # noqa: PLR2004  (the width that has no kernel)


def explain(layout: WeightLayout | None, columns: int) -> Explanation:
    """What ONNX Runtime makes of a matrix with this number of columns."""
    if layout is None:
        return Explanation(stored="float32")
    if isinstance(layout, CodebookLayout):
        return _explain_codebook(layout)
    if isinstance(layout, AffineLayout):
        return _explain_affine(layout, columns)
    stored, price = describe_masked(layout, "ONNX Runtime")
    plain = layout.without_mask
    found = Explanation() if plain is None else _explain_affine(plain, columns)
    return Explanation(stored=stored, refusal=found.refusal, prices=(*found.prices, price))


def _explain_affine(layout: AffineLayout, columns: int) -> Explanation:
    if layout.has_byte_rows(columns):
        return Explanation(stored="int8 a row, int8 activations")
    container = container_bits(layout.bits)
    if layout.group_size not in BLOCK_SIZES:
        return Explanation(
            refusal=f"group size {layout.group_size} has no ONNX Runtime kernel; allowed are "
            f"{', '.join(map(str, BLOCK_SIZES))}, and the whole row of 8 bits, symmetric"
        )
    if layout.float_zeros and container not in _FLOAT_ZERO_BITS:
        return Explanation(
            refusal="8-bit codes with float zero points have no ONNX Runtime kernel; integer zero "
            "points, a symmetric grid, or 2, 3 or 4 bits have"
        )
    stored = describe_grid(layout)
    prices = []
    if layout.float_zeros:
        stored = f"int{layout.bits} g{layout.group_size} float zeros"
        prices.append(
            "have float zero points, which ONNX Runtime multiplies in float32: slower than integer "
            "zero points"
        )
    if container != layout.bits:
        stored += f" in {container}-bit containers"
        prices.append(
            f"of {layout.bits} bits are stored in {container}-bit containers: no kernel reads "
            f"{layout.bits} bits, so they cost what {container} bits cost"
        )
    if layout.bits == _NARROW_BITS:
        prices.append("of 2 bits are smaller, and slower than 4 bits on a CPU")
    return Explanation(stored=stored, prices=tuple(prices))


def _explain_codebook(layout: CodebookLayout) -> Explanation:
    length = layout.vector_length
    bits = (layout.index_bits + (layout.residual_bits or 0)) / length
    residual = "" if layout.residual_bits is None else " with residual"
    return Explanation(
        stored=f"{bits:g}-bit codebook v{length} k{1 << layout.index_bits}{residual}, float32 in "
        "memory",
        prices=(
            "of codebooks are small on disk and dense float32 once loaded: ONNX Runtime has no "
            "kernel for them",
        ),
    )
