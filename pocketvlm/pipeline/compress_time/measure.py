"""Measures how fast this host compresses: the functions of the walk and of GPTQ on made-up layers.

Every figure is the best of some repeats, in turns, so that what else runs for a moment does not
count. Sizes are those of small models; what a wider layer costs follows from the counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.calibration.walk.steps import InputMoments
from pocketvlm.compress.layerwise.error_feedback import factorize
from pocketvlm.compress.layerwise.hessian import ErrorFeedback, InputHessian
from pocketvlm.compress.quantization.affine.gptq import AffineQuantizer
from pocketvlm.compress.quantization.affine.grid import GRIDS, GridKind
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.rules import Assignment
from pocketvlm.context import RunContext
from pocketvlm.device_bench.prediction.calibration.host_file import machine_identity
from pocketvlm.models.layers import LinearSpec
from pocketvlm.pipeline.compress_time.rates import (
    SCHEMA,
    CompressCalibration,
    CompressRates,
    RoundingRates,
    keep_compress_calibration,
    torch_version,
)
from pocketvlm.weights.dense import DenseWeight

__all__ = ["calibrate_compress", "measure_compress_rates"]

_REPEATS = 3
_GROUP = 32
_TOKENS, _WIDTH = 1024, 1536
_HEADS, _HEAD_DIM = 12, 64
_FACTORED = (512, 1536)
# Rows and columns of layers, each small enough to be rounded in one chunk of rows.
_LAYERS = ((256, 512), (2048, 512), (512, 2048))

Clock = Callable[[], float]


def calibrate_compress(threads: int, ctx: RunContext | None = None) -> CompressCalibration:
    """Measures this host with one thread and with `threads`, and keeps the result.

    Args:
        threads: Threads of torch.
        ctx: Told what is measured next.

    Raises:
        StorageError: The result cannot be written.
    """
    processor, cores, _ = machine_identity()
    rates: list[CompressRates] = []
    counts = sorted({1, threads})
    for count in counts:
        if ctx is not None:
            ctx.report("calibrate", len(rates), len(counts), f"compress, {count} threads")
        rates.append(measure_compress_rates(count))
    found = CompressCalibration(
        schema=SCHEMA,
        processor=processor,
        cores=cores,
        torch=torch_version(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        rates=tuple(rates),
    )
    keep_compress_calibration(found)
    return found


def measure_compress_rates(threads: int, clock: Clock = time.perf_counter) -> CompressRates:
    """Measures what torch reaches with a number of threads.

    Args:
        threads: Threads.
        clock: Seconds; of the process where others would disturb the time of the wall.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return _measure(threads, clock)
    finally:
        torch.set_num_threads(before)


def _measure(threads: int, clock: Clock) -> CompressRates:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs, weight = normal(_TOKENS, _WIDTH), normal(_WIDTH, _WIDTH)
    heads = normal(1, _HEADS, _TOKENS, _HEAD_DIM)
    moment = SecondMoment(_WIDTH)
    quantizer = AffineQuantizer(feedback=ErrorFeedback(damping=0.01, order="group_aware"))
    task, hessian, dense = _layer(normal, *_LAYERS[0])
    narrow = quantizer.compress(task, dense, hessian).form
    small, wide = (_hessian(normal, width).hessians[0] for width in _FACTORED)
    times = _best(
        {
            "product": lambda: functional.linear(inputs, weight),
            "attention": lambda: functional.scaled_dot_product_attention(heads, heads, heads),
            "moment": lambda: moment.add(inputs),
            "small": lambda: factorize(small, group_size=_GROUP, damping=0.01, order="natural"),
            "wide": lambda: factorize(wide, group_size=_GROUP, damping=0.01, order="natural"),
            "widen": narrow.dequantize,
        },
        clock,
    )
    square_s, cube_s = _solve(
        [[width**2, width**3] for width in _FACTORED], [times["small"], times["wide"]]
    )
    rows, columns = _LAYERS[0]
    return CompressRates(
        threads=threads,
        product_macs_s=_TOKENS * _WIDTH**2 / times["product"],
        attention_macs_s=2 * _TOKENS**2 * _HEADS * _HEAD_DIM / times["attention"],
        moment_macs_s=_TOKENS * _WIDTH**2 / times["moment"],
        factor_elements_s=1 / square_s,
        factor_macs_s=1 / cube_s,
        widened_weights_s=rows * columns / times["widen"],
        rounding={kind: _rounding(kind, normal, clock) for kind in GRIDS},
    )


def _rounding(kind: GridKind, normal: Callable[..., Tensor], clock: Clock) -> RoundingRates:
    """Whole layers of three shapes, which tell columns, weights and feedback apart."""
    quantizer = AffineQuantizer(
        feedback=ErrorFeedback(damping=0.01, order="group_aware"), grid=kind
    )
    made = [_layer(normal, *shape) for shape in _LAYERS]
    for _, hessian, _ in made:
        hessian.factorize(_GROUP)  # timed by itself
    times = _best(
        {
            str(number): partial(quantizer.compress, task, dense, hessian)
            for number, (task, hessian, dense) in enumerate(made)
        },
        clock,
    )
    column_s, weight_s, feedback_s = _solve(
        [[columns, rows * columns, rows * columns**2] for rows, columns in _LAYERS],
        [times[str(number)] for number in range(len(_LAYERS))],
    )
    return RoundingRates(
        column_us=1e6 * column_s, weight_ns=1e9 * weight_s, feedback_macs_s=1 / feedback_s
    )


def _layer(
    normal: Callable[..., Tensor], rows: int, columns: int
) -> tuple[Assignment[WeightRule], InputHessian, DenseWeight]:
    linear = LinearSpec(
        name="layer",
        part="decoder",
        role="layer",
        block=None,
        out_features=rows,
        in_features=columns,
        has_bias=False,
    )
    rule = WeightRule(bits=4, group_size=_GROUP, symmetric=True)
    return (
        Assignment(linear=linear, rule=rule, reason=""),
        _hessian(normal, columns),
        DenseWeight(values=normal(rows, columns)),
    )


def _hessian(normal: Callable[..., Tensor], width: int) -> InputHessian:
    fitted, judging = SecondMoment(width), SecondMoment(width)
    for moment in (fitted, judging):
        moment.add(normal(2 * width, width))
    return InputHessian.from_moments(
        InputMoments(calibration=fitted, held_out=judging),
        ErrorFeedback(damping=0.01, order="group_aware"),
    )


def _best(calls: Mapping[str, Callable[[], object]], clock: Clock) -> dict[str, float]:
    """Seconds of each call: the best of some, in turns, after one that does not count."""
    best = dict.fromkeys(calls, float("inf"))
    for repeat in range(1 + _REPEATS):
        for name, call in calls.items():
            started = clock()
            call()
            took = clock() - started
            if repeat:
                best[name] = min(best[name], took)
    return best


def _solve(counts: list[list[int]], seconds: list[float]) -> list[float]:
    """Seconds of each count, none of them negative: where noise says so, it is next to nothing."""
    solved = np.linalg.lstsq(np.array(counts, dtype=float), np.array(seconds), rcond=None)[0]
    return [max(float(one), 1e-15) for one in solved]
