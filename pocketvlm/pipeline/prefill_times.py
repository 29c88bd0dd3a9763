"""Predicts the prefill of a recipe's model under any schedule, for stages with a budget of time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from pocketvlm.bundle import VisualSchedule
from pocketvlm.context import PrefillTimes
from pocketvlm.device_bench.devices import device_names, load_device
from pocketvlm.device_bench.prediction.decoder_work import DecoderWork, count_decoder
from pocketvlm.device_bench.prediction.device_rates import rates_of
from pocketvlm.device_bench.prediction.rates import Rates
from pocketvlm.device_bench.prediction.roofline import CacheType, predict_prefill_ms
from pocketvlm.errors import RecipeError
from pocketvlm.pipeline.predict import cache_type, exported_model
from pocketvlm.stages import PlanState, Target

__all__ = ["prefill_times"]


def prefill_times(planned: Callable[[], PlanState], targets: Sequence[Target]) -> PrefillTimes:
    """What prefill of a recipe's model takes under one schedule of visual rows or another.

    Args:
        planned: Plans the recipe without a schedule.
        targets: Its targets.
    """

    @cache
    def known(device: str) -> tuple[DecoderWork, Rates, CacheType]:
        if device not in device_names():
            load_device(device)  # which says what there is
            raise RecipeError(f"device {device!r} is a file; allowed is the name of a profile")
        state = planned()
        model, (rates, basis) = exported_model(state, targets), rates_of(load_device(device))
        if isinstance(model, str) or rates is None:
            reason = model if isinstance(model, str) else basis
            raise RecipeError(f"no prefill can be predicted for {device}: {reason}")
        return count_decoder(model), rates, cache_type(state)

    def mean(
        device: str, prompts: Sequence[tuple[int, int]], schedule: VisualSchedule | None
    ) -> float:
        decoder, rates, cached = known(device)
        dropping = replace(decoder, visual_schedule=schedule)
        taken = sum(
            count * predict_prefill_ms(dropping, rates, *rows, cache=cached)
            for rows, count in Counter(prompts).items()
        )
        return taken / len(prompts)

    return mean
