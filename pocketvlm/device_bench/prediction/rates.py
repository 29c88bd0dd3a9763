"""Rates: how fast a device computes and reads, kernel by kernel, as a calibration measured it.

A rate is what a runtime's kernel reaches, not what the processor could: the efficiency is in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

__all__ = [
    "BYTE_ROWS_KERNEL",
    "FLOAT_KERNEL",
    "AttentionRates",
    "ProductRates",
    "Rates",
    "kernel_bits",
    "quantized_kernel",
    "require_kernel",
]

FLOAT_KERNEL = "float32"
"""Products of float32 weights; whatever a bundle stores as floats is float32 once loaded."""

BYTE_ROWS_KERNEL = "int8 row"
"""Products of int8 weights that have one scale per row."""

_SCALE_BITS = 16
_WIDEST = 1 << 16
_QUANTIZED = re.compile(r"int[1-9]\d? g[1-9]\d{0,8}")


def quantized_kernel(bits: int, group_size: int) -> str:
    """Name of the kernel that multiplies codes of `bits` bits, `group_size` columns to a scale."""
    return f"int{bits} g{group_size}"


def require_kernel(kernel: str) -> None:
    """Checks that a name is that of a kernel, calibrated or not.

    Raises:
        ValueError: It is none.
    """
    if kernel not in (FLOAT_KERNEL, BYTE_ROWS_KERNEL) and not _QUANTIZED.fullmatch(kernel):
        raise ValueError(f"kernel is {kernel!r}; a kernel is called as {quantized_kernel(4, 32)!r}")


def kernel_bits(kernel: str) -> float:
    """Bits that a kernel reads of a weight, its share of scale and zero point included."""
    bits, group_size = _widths(kernel)
    return bits + (_SCALE_BITS + bits) / group_size if group_size else bits


@dataclass(frozen=True, kw_only=True)
class _Positive:
    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not value > 0:
                raise ValueError(f"{item.name} is {value:g}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class ProductRates(_Positive):
    """Products with one kind of weights.

    Attributes:
        macs_s: Multiplications and additions per second where many rows share the weights.
        weights_s: Weights per second where one row reads them from memory.
        node_us: What one product costs beside that, in microseconds.
    """

    macs_s: float
    weights_s: float
    node_us: float

    def seconds(self, rows: int, weights: int, nodes: int = 1) -> float:
        """Time of this many products: compute or reading, whichever takes longer."""
        work_s = max(weights / self.weights_s, rows * weights / self.macs_s)
        return work_s + nodes * self.node_us / 1e6


@dataclass(frozen=True, kw_only=True)
class AttentionRates(_Positive):
    """Attention that reads a KV cache of one type.

    Attributes:
        macs_s: Of many rows: multiplications and additions per second of scores and sums.
        row_macs_s: Of one row, which reads the cache.
        node_us: What one node costs beside that, in microseconds.
    """

    macs_s: float
    row_macs_s: float
    node_us: float


@dataclass(frozen=True, kw_only=True)
class Rates(_Positive):
    """What a device reaches with a number of threads.

    Attributes:
        threads: Threads of the heavy graphs.
        products: By kernel: `float32`, `int8 row`, or as `quantized_kernel` names it.
        attention: Of the decoder, by the type of the cache: `float32` or `int8`.
        tower_macs_s: Multiplications and additions per second of attention among patches.
        activation_elements_s: Elements per second of an activation function, by the name that
            Hugging Face gives it.
        norm_elements_s: Elements per second of a norm with the sum before it.
        copy_elements_s: Elements per second of a sum, a product or a copy of each element.
        node_us: What any other node costs, in microseconds.
        call_us: What one call of a graph costs, in microseconds.
        memory_read_bytes_s: Bytes per second that a plain reduction reads from memory.
        decoded_pixels_s: Pixels per second of a JPEG that is decoded.
        resized_pixels_s: Pixels per second that are made of it by a resize and scaled to floats.
        sampled_logits_s: Logits per second among which a token is chosen.
        token_us: What a generated token costs beside graphs and choice, in microseconds.
    """

    threads: int
    products: Mapping[str, ProductRates]
    attention: Mapping[str, AttentionRates]
    tower_macs_s: float
    activation_elements_s: Mapping[str, float]
    norm_elements_s: float
    copy_elements_s: float
    node_us: float
    call_us: float
    memory_read_bytes_s: float
    decoded_pixels_s: float
    resized_pixels_s: float
    sampled_logits_s: float
    token_us: float

    def product(self, kernel: str) -> ProductRates:
        """Rates of a kernel; of the most similar one where it was not calibrated itself."""
        found = self.products.get(kernel)
        return found or self.products[min(self.products, key=lambda name: _distance(name, kernel))]

    def activation(self, kind: str) -> float:
        """Elements per second of an activation; the slowest one's where it was not calibrated."""
        return self.activation_elements_s.get(kind) or min(self.activation_elements_s.values())


def _distance(left: str, right: str) -> tuple[float, float]:
    """How different two kernels are: in bits, then in the size of groups."""
    (left_bits, left_group), (right_bits, right_group) = _widths(left), _widths(right)
    return abs(left_bits - right_bits), abs(left_group - right_group)


def _widths(kernel: str) -> tuple[int, int]:
    if kernel == FLOAT_KERNEL:
        return 32, 0
    if kernel == BYTE_ROWS_KERNEL:
        return 8, _WIDEST
    bits, _, group = kernel.removeprefix("int").partition(" g")
    return int(bits), int(group)
