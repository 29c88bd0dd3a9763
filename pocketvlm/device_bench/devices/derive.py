"""Rates of a device that nobody calibrated, derived from its profile and a calibrated machine.

Arithmetic: a kernel is taken to reach the same share of what the vector units could do as it
reached on the reference machine. Memory: decoding is taken to read `READ_SHARE` of what the memory
could deliver. Fixed costs of nodes and calls are those of the reference, at the ratio of clocks.

None of this was measured on the device. What it is worth is printed: `pipeline.published` compares
it with every figure that others published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pocketvlm.device_bench.devices.profile import Device
from pocketvlm.device_bench.prediction.rates import (
    FLOAT_KERNEL,
    AttentionRates,
    ProductRates,
    Rates,
    kernel_bits,
)
from pocketvlm.errors import InputError
from pocketvlm.json_io import decode, read_json

__all__ = ["READ_SHARE", "Reference", "derive_rates", "load_reference"]

READ_SHARE = 0.53
"""Share of the memory's peak that decoding reads with all performance cores.

It is fitted to published rates: the median over decoders of 0.4 billion weights or more on CPUs,
for which reading is nearly all of decoding (`benchmarks/published_figures.py` prints each).
"""

_REFERENCE = Path(__file__).parents[1] / "prediction" / "reference_rates.json"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The machine whose shares of its peak other devices are taken to reach.

    Attributes:
        processor: Its name.
        source: Where its peak is from.
        hz: Clock of the cores while it was measured.
        float_macs_s: Float32 multiplications and additions that the threads could do a second.
        int8_macs_s: The same of int8.
        rates: What its kernels reached.
    """

    processor: str
    source: str
    hz: float
    float_macs_s: float
    int8_macs_s: float
    rates: Rates


@cache
def load_reference() -> Reference:
    """The reference of this package."""
    return decode(Reference, read_json(_REFERENCE, error=InputError), _REFERENCE.name)


def derive_rates(device: Device) -> Rates | str:
    """What a device is taken to reach, or why that cannot be said."""
    reference = load_reference()
    float_macs_s, int8_macs_s = device.float_macs_s, device.int8_macs_s
    bandwidth, hz = device.memory_bandwidth_bytes_s.value, device.fastest_hz
    missing = [
        what
        for value, what in (
            (float_macs_s, "the vector units of its cores"),
            (bandwidth, "the bandwidth of its memory"),
        )
        if value is None
    ]
    if float_macs_s is None or int8_macs_s is None or bandwidth is None or hz is None:
        return f"its profile has no source for {' and '.join(missing)}"
    rates = reference.rates
    faster = float_macs_s / reference.float_macs_s
    clock = hz / reference.hz
    products = {
        name: _product(
            name,
            found,
            faster if name == FLOAT_KERNEL else int8_macs_s / reference.int8_macs_s,
            bandwidth * READ_SHARE,
            clock,
        )
        for name, found in rates.products.items()
    }
    return replace(
        rates,
        threads=device.performance_cores,
        products=products,
        attention=_scaled_attention(rates.attention, faster, clock),
        tower_macs_s=rates.tower_macs_s * faster,
        activation_elements_s={
            kind: value * faster for kind, value in rates.activation_elements_s.items()
        },
        norm_elements_s=rates.norm_elements_s * faster,
        copy_elements_s=min(rates.copy_elements_s * faster, bandwidth * READ_SHARE / 8),
        node_us=rates.node_us / clock,
        call_us=rates.call_us / clock,
        memory_read_bytes_s=bandwidth * READ_SHARE,
        decoded_pixels_s=rates.decoded_pixels_s * clock,
        resized_pixels_s=rates.resized_pixels_s * clock,
        sampled_logits_s=rates.sampled_logits_s * clock,
        token_us=rates.token_us / clock,
    )


def _product(
    name: str, found: ProductRates, faster: float, read_bytes_s: float, clock: float
) -> ProductRates:
    return ProductRates(
        macs_s=found.macs_s * faster,
        weights_s=read_bytes_s / (kernel_bits(name) / 8),
        node_us=found.node_us / clock,
    )


def _scaled_attention(
    rates: Mapping[str, AttentionRates], faster: float, clock: float
) -> Mapping[str, AttentionRates]:
    return {
        kind: AttentionRates(
            macs_s=found.macs_s * faster,
            row_macs_s=found.row_macs_s * faster,
            node_us=found.node_us / clock,
        )
        for kind, found in rates.items()
    }
