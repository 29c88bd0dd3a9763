"""Which layers bear inputs in int8: what rounding these costs, from the moments of calibration.

A kernel that sums a whole row in integers rounds its input with one scale
(`export/onnx/byte_rows`). A channel or a token that is far larger than the others widens the step
for all of them. Where that costs too much of a layer's output, the layer takes groups of columns,
whose kernels give each block of an input its own scale: slower, and an outlier is then paid for by
its own block alone.
"""

from __future__ import annotations

import torch

from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.layerwise.report import relative
from pocketvlm.compress.layerwise.row_chunks import row_chunks
from pocketvlm.models.layers import Part
from pocketvlm.weights.form import WeightForm

__all__ = ["MOST_LOST", "input_loss"]

MOST_LOST = 0.003
"""Share of a layer's squared output that rounding its input may cost: 25 dB, which is what a
certificate asks of a whole decoder."""


def input_loss(weight: WeightForm, hessian: InputHessian, part: Part) -> float:
    """Squared change of a layer's output by inputs in int8, relative to the output's squares.

    An error of rounding to a step s is taken to be uniform, with the variance s**2 / 12, and
    independent from channel to channel. Then the change is s**2 / 12 |W|**2, and the output's
    squares are tr(W H W^T). Channels that stay below half of a step err less than that, so what is
    returned is rather too much.

    Args:
        weight: W.
        hessian: Of the input: H, and the steps.
        part: Where the layer stands: towers and projectors round tiles, decoders rows.
    """
    steps = hessian.steps
    step = steps.tile if part in ("tower", "projector") else steps.row
    squares = output = 0.0
    for _, chunk in row_chunks(weight, hessian.device):
        rows = chunk.to(torch.float32)
        squares += float(rows.square().sum(dtype=torch.float64))
        for columns, H in zip(hessian.slices, hessian.judge, strict=True):
            narrow = rows[:, columns]
            output += float(((narrow @ H.to(torch.float32)) * narrow).sum(dtype=torch.float64))
    return relative(step / 12 * squares, output)
