"""`plan --advise`: which levers pay in milliseconds, and what else the same compute would buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.device_bench.devices import Device
from pocketvlm.device_bench.prediction.device_rates import rates_of
from pocketvlm.device_bench.prediction.roofline import Times, predict_times
from pocketvlm.pipeline.advice.choices import Choices, decoder_weights, offer_choices
from pocketvlm.pipeline.advice.levers import Levers, weigh_levers
from pocketvlm.pipeline.advice.measured_law import fit_tokens, read_token_scores
from pocketvlm.pipeline.predict import PREDICTED_WORKLOAD, model_work, question_of
from pocketvlm.stages import PlanState, Target

__all__ = ["Advice", "advise"]

_APP_SHARE = 0.5  # of a device's memory, where nobody says what an app may use


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What pays for a model.

    Attributes:
        basis: What times are predicted for; why, where there are none.
        levers: In milliseconds; `None` without times.
        choices: Sizes and numbers of tokens for the same compute.
    """

    basis: str
    levers: Levers | None
    choices: Choices

    def lines(self) -> list[str]:
        """The advice for people."""
        return [
            f"advice         {self.basis}",
            *(() if self.levers is None else self.levers.lines()),
            *self.choices.lines(),
        ]


def advise(
    state: PlanState, targets: Sequence[Target], device: Device, *, measured: Sequence[Path] = ()
) -> Advice:
    """Weighs levers and choices for a planned model.

    Args:
        state: The model as its recipe leaves it.
        targets: What it is exported to.
        device: Whose times are predicted, and whose memory limits a decoder.
        measured: Scored runs of the model that differ in the tokens they keep.

    Raises:
        InputError: The runs are not of this model, have no score, or are too few.
    """
    question = question_of(state, PREDICTED_WORKLOAD)
    rates, basis = rates_of(device)
    model = model_work(state, targets)
    levers = None
    if isinstance(model, str):
        basis = f"no times: {model}"
    elif rates is None:
        basis = f"no times for {device.name}: {basis}"
    else:
        reached = rates

        def times_of(changed: PlanState) -> Times:
            exported = model_work(changed, targets)
            if isinstance(exported, str):  # never: no lever changes how a matrix is stored
                raise TypeError(exported)
            return predict_times(exported, question_of(changed, PREDICTED_WORKLOAD), reached)

        basis = (
            f"times predicted for {device.name}, {rates.threads} threads, {basis}; workload "
            f"{PREDICTED_WORKLOAD.name}, {question.rows} rows in {question.tiles} tiles"
        )
        levers = weigh_levers(state, targets, times_of, tiles=question.tiles)
    fit = None
    if measured:
        scores = read_token_scores(measured, state.spec)
        fit = fit_tokens(scores, weights=decoder_weights(state.spec))
    return Advice(
        basis=basis,
        levers=levers,
        choices=offer_choices(
            state, targets, question, most_bytes=_most_bytes(device), measured=fit
        ),
    )


def _most_bytes(device: Device) -> float | None:
    limit, ram = device.app_memory_bytes.value, device.ram_bytes.value
    if limit is not None:
        return limit
    return None if ram is None else ram * _APP_SHARE
