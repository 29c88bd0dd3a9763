"""Measures the rates of this machine: probes take turns, and rates are fitted to their medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from pocketvlm.context import RunContext
from pocketvlm.device_bench.prediction.calibration.host_stages import (
    HostStages,
    host_stage_seconds,
)
from pocketvlm.device_bench.prediction.calibration.probe_times import ProbeTimes
from pocketvlm.device_bench.prediction.calibration.probes import (
    ACTIVATIONS,
    Probe,
    activation_probe,
    cached_attention_probe,
    call_probe,
    copy_probe,
    norm_probe,
    product_probe,
    tower_attention_probe,
)
from pocketvlm.device_bench.prediction.rates import (
    BYTE_ROWS_KERNEL,
    FLOAT_KERNEL,
    AttentionRates,
    ProductRates,
    Rates,
    quantized_kernel,
)
from pocketvlm.device_bench.runner.bandwidth import memory_read_bytes_s

__all__ = [
    "Effort",
    "MeasuredRates",
    "fit_attention",
    "fit_product",
    "fit_rates",
    "measure_rates",
]

_KERNELS: Mapping[str, tuple[int | None, int]] = {
    FLOAT_KERNEL: (None, 0),
    BYTE_ROWS_KERNEL: (8, 0),
} | {
    quantized_kernel(*grid): grid
    for grid in ((8, 32), (8, 64), (8, 128), (4, 32), (4, 64), (4, 128), (2, 64))
}
_SMALL, _LARGE = (512, 768), (1024, 3072)
_MANY = (768, 2304)
_ROWS = 128
_TOWER = (576, 12, 64)  # tokens, heads, channels of a head
_HEADS, _HEAD_DIM = (9, 3), 64
_SHORT_PAST, _LONG_PAST = 32, 1024
_ELEMENTS = (_ROWS, 3072)
_STEP_NODES = 16
_PAIRED = quantized_kernel(4, 64)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        runs: The fewest runs of a probe each time that it is made.
        probe_s: Seconds that its runs take at least.
        rounds: How often every probe is made.
        longest_s: Seconds after which only the first round continues.
        streamed_bytes: Weights of a chain that is to be read from memory; `None` for three times
            the largest cache.
    """

    runs: int = 5
    probe_s: float = 0.15
    rounds: int = 3
    longest_s: float = 45.0
    streamed_bytes: int | None = None


_A_MINUTE = Effort()


@dataclass(frozen=True, kw_only=True)
class MeasuredRates:
    """Rates, and what they were fitted to.

    Attributes:
        rates: What the machine reaches.
        probes: What each probe took, by its name.
    """

    rates: Rates
    probes: Mapping[str, ProbeTimes]


def measure_rates(
    threads: int, ctx: RunContext | None = None, *, effort: Effort = _A_MINUTE
) -> MeasuredRates:
    """Measures what this machine reaches, in less than a minute.

    Everything is measured once, and again in a second and a third round for as long as time is
    left: what is compared should have seen the same minutes.

    Args:
        threads: Threads of the sessions.
        ctx: Told what is measured next.
        effort: How much is measured.

    Returns:
        The rates, from the median over all runs, and those medians.
    """
    ctx = ctx or RunContext()
    steps = list(_steps(threads, effort.streamed_bytes))
    samples: dict[str, list[float]] = {name: [] for name, _ in steps}
    start = time.perf_counter()
    for done in range(effort.rounds * len(steps)):
        if done >= len(steps) and time.perf_counter() - start > effort.longest_s:
            break
        name, make = steps[done % len(steps)]
        ctx.report("calibrate", done, effort.rounds * len(steps), name)
        samples[name] += _run(make(), effort)
    probes = {name: ProbeTimes.of(taken) for name, taken in samples.items()}
    rates = fit_rates(
        threads,
        {name: taken.median_s for name, taken in probes.items()},
        host_stage_seconds(),
        memory_read_bytes_s(threads),
    )
    return MeasuredRates(rates=rates, probes=probes)


def fit_rates(
    threads: int, seconds: Mapping[str, float], stages: HostStages, memory_bytes_s: float
) -> Rates:
    """The rates of a machine.

    Args:
        threads: Threads of the sessions.
        seconds: What a node of each probe took, by the probe's name.
        stages: What was reached outside of graphs.
        memory_bytes_s: Bytes per second that a plain reduction reads from memory.
    """
    node_s = max(seconds["products and norms"] - seconds[f"{_PAIRED}, small"], 1e-8)
    elements = _ELEMENTS[0] * _ELEMENTS[1]
    return Rates(
        threads=threads,
        products={name: fit_product(name, seconds) for name in _KERNELS},
        attention={kind: fit_attention(kind, seconds) for kind in ("float32", "int8")},
        tower_macs_s=_tower_macs() / seconds["tower attention"],
        activation_elements_s={
            kind: elements / seconds[f"activation {kind}"] for kind in ACTIVATIONS
        },
        norm_elements_s=elements / seconds["norm"],
        copy_elements_s=elements / seconds["copy"],
        node_us=node_s * 1e6,
        call_us=seconds["call"] * 1e6,
        memory_read_bytes_s=memory_bytes_s,
        decoded_pixels_s=stages.decoded_pixels_s,
        resized_pixels_s=stages.resized_pixels_s,
        sampled_logits_s=stages.sampled_logits_s,
        token_us=stages.token_us,
    )


def _steps(threads: int, streamed_bytes: int | None) -> Iterator[tuple[str, Callable[[], Probe]]]:
    """What is measured, by name; each is made when its turn comes, and freed after it."""
    for name, (bits, group_size) in _KERNELS.items():
        for label, widths, rows in (
            ("small", _SMALL, 1),
            ("large", _LARGE, 1),
            ("many rows", _MANY, _ROWS),
        ):
            make = partial(
                product_probe,
                widths,
                rows,
                threads,
                bits=bits,
                group_size=group_size,
                streamed_bytes=streamed_bytes,
            )
            yield f"{name}, {label}", make
            if (name, label) == (_PAIRED, "small"):  # what is subtracted should have seen the same
                yield "products and norms", partial(make, has_norms=True)
    yield "tower attention", partial(tower_attention_probe, *_TOWER, threads)
    for kind in ("float32", "int8"):
        for label, rows, past, nodes in (
            ("short", 1, _SHORT_PAST, _STEP_NODES),
            ("long", 1, _LONG_PAST, _STEP_NODES),
            ("many rows", _ROWS, 0, 1),
        ):
            attend = partial(cached_attention_probe, rows, past, _HEADS, _HEAD_DIM, threads)
            yield f"{kind} cache, {label}", partial(attend, is_int8=kind == "int8", nodes=nodes)
    for kind in ACTIVATIONS:
        yield f"activation {kind}", partial(activation_probe, kind, *_ELEMENTS, threads)
    yield "norm", partial(norm_probe, *_ELEMENTS, threads)
    yield "copy", partial(copy_probe, *_ELEMENTS, threads)
    yield "call", partial(call_probe, _ELEMENTS[1], threads)


def _run(probe: Probe, effort: Effort) -> list[float]:
    """Seconds of a node, of each run."""
    probe.run()  # the first run packs weights and touches memory
    samples: list[float] = []
    end = time.perf_counter() + effort.probe_s
    while len(samples) < effort.runs or time.perf_counter() < end:
        start = time.perf_counter()
        probe.run()
        samples.append((time.perf_counter() - start) / probe.nodes)
    return samples


def fit_product(kernel: str, seconds: Mapping[str, float]) -> ProductRates:
    """Rates of a kernel: a line through its two sizes of one row, and what many rows take.

    Args:
        kernel: The kernel.
        seconds: Of one product, by what was measured.
    """
    small, large = (seconds[f"{kernel}, {label}"] for label in ("small", "large"))
    small_weights, large_weights = (widths[0] * widths[1] for widths in (_SMALL, _LARGE))
    weight_s = max((large - small) / (large_weights - small_weights), large / large_weights / 2)
    node_s = max(small - weight_s * small_weights, 1e-8)
    many_s = max(seconds[f"{kernel}, many rows"] - node_s, 1e-9)
    return ProductRates(
        macs_s=_ROWS * _MANY[0] * _MANY[1] / many_s, weights_s=1 / weight_s, node_us=node_s * 1e6
    )


def fit_attention(kind: str, seconds: Mapping[str, float]) -> AttentionRates:
    """Rates of attention to a cache of this type, likewise."""
    short, long = (seconds[f"{kind} cache, {label}"] for label in ("short", "long"))
    heads = 2 * _HEADS[0] * _HEAD_DIM
    row_s = max((long - short) / (heads * (_LONG_PAST - _SHORT_PAST)), 1e-13)
    node_s = max(short - row_s * heads * _SHORT_PAST, 1e-8)
    many_s = max(seconds[f"{kind} cache, many rows"] - node_s, 1e-9)
    return AttentionRates(
        macs_s=heads * _ROWS * _ROWS / many_s, row_macs_s=1 / row_s, node_us=node_s * 1e6
    )


def _tower_macs() -> float:
    tokens, heads, head_dim = _TOWER
    return 2 * tokens * tokens * heads * head_dim
