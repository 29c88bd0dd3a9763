"""Published figures beside predictions: how far off a prediction from a profile is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from pocketvlm.device_bench.devices import Device, PublishedFigure
from pocketvlm.device_bench.devices.derive import derive_rates
from pocketvlm.device_bench.prediction.costs import ExportedModel
from pocketvlm.device_bench.prediction.decoder_work import decoder_operators
from pocketvlm.device_bench.prediction.operators import Product
from pocketvlm.device_bench.prediction.roofline import Question, predict_times
from pocketvlm.device_bench.prediction.work import count_work
from pocketvlm.reference.shapes import load_shape

__all__ = ["PublishedFactor", "median_factor", "published_factors"]

_QUESTION = Question(
    text_rows=512, visual_rows=0, tiles_by_vision=(), picture_pixels=0, new_tokens=128
)
"""The text workload that rates are published for: a prompt of 512 tokens, 128 new ones."""

_METRICS = ("prefill_tok_s", "decode_tok_s")


@dataclass(frozen=True, kw_only=True)
class PublishedFactor:
    """One published figure, and the prediction of it.

    Attributes:
        device: Name of the device.
        figure: The figure.
        predicted: What the device's profile predicts for a decoder of the same sizes.
        factor: Predicted divided by published.
        decoder_weights: Weights that a step of that decoder reads.
    """

    device: str
    figure: PublishedFigure
    predicted: float
    factor: float
    decoder_weights: int


def published_factors(device: Device) -> tuple[PublishedFactor, ...]:
    """Every rate that others published of a device's CPU for a decoder whose sizes are known."""
    rates = derive_rates(device)
    if isinstance(rates, str):
        return ()
    found = []
    for figure in device.published:
        if (
            figure.unit != "cpu"
            or figure.metric not in _METRICS
            or figure.shape is None
            or figure.kernel is None
        ):
            continue
        spec = load_shape(figure.shape).spec
        model = count_work(
            ExportedModel(
                spec=spec,
                kernels=dict.fromkeys(spec.linears(), figure.kernel),
                visual_tokens=spec.visual_tokens,
            )
        )
        times = predict_times(model, _QUESTION, rates)
        predicted = getattr(times, figure.metric)
        found.append(
            PublishedFactor(
                device=device.name,
                figure=figure,
                predicted=predicted,
                factor=predicted / figure.value,
                decoder_weights=sum(
                    one.weights
                    for one in decoder_operators(model.decoder, text_rows=1)
                    if isinstance(one, Product)
                ),
            )
        )
    return tuple(found)


def median_factor(factors: Iterable[PublishedFactor], metric: str) -> float | None:
    """The median factor of a metric; `None` where there is no such figure."""
    values = [one.factor for one in factors if one.figure.metric == metric]
    return median(values) if values else None
