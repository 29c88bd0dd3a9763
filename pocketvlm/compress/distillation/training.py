"""The training loop: AdamW, a warm-up and a cosine, the best held-out state, and going on.

Everything that a later step depends on is in its parameters, the optimizer's moments and the number
of the step: the order of samples comes from seed and epoch. So an interrupted run resumes at its
last saved step and ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pocketvlm.compress.distillation.answers import shuffled_batches
from pocketvlm.compress.distillation.objective import Figures, Objective
from pocketvlm.compress.distillation.student import Student
from pocketvlm.compress.layerwise.scratch import find_tensors, keep_tensors
from pocketvlm.context import ALONE, Ranks
from pocketvlm.errors import CalibrationError

__all__ = ["Check", "Schedule", "Training", "rate_share", "train"]

_STATE = "training.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: Steps of the optimizer.
        batch_size: Samples per step.
        pass_size: Samples that run through the model together; what a step holds in memory.
        rate: Largest learning rate of the layers' updates.
        vector_rate: Largest learning rate of norms and biases.
        warmup: Share of the steps in which rates rise.
        weight_decay: Of the updates, towards the weights that training began with.
        clip_norm: Longest gradient.
        check_every: Steps between two looks at the held-out samples.
        seed: Of the order of samples.
    """

    steps: int
    batch_size: int
    pass_size: int
    rate: float
    vector_rate: float
    warmup: float
    weight_decay: float
    clip_norm: float
    check_every: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Check:
    """Held-out figures after that many steps, of the weights as they would be stored."""

    step: int
    figures: Figures


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What came of it; the student is in its best state.

    Attributes:
        checks: Every look at the held-out samples, the one before the first step included.
        best: The one with the lowest loss.
    """

    checks: tuple[Check, ...]
    best: Check


def rate_share(step: int, steps: int, warmup: float) -> float:
    """The share of its largest value that a rate has: a linear rise, then half a cosine to zero.

    Args:
        step: From 0.
        steps: In all.
        warmup: Share of the steps in which it rises.
    """
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def train(
    student: Student,
    objective: Objective,
    schedule: Schedule,
    *,
    fitted: Sequence[int],
    judging: Sequence[int],
    folder: Path | None,
    on_step: Callable[[int, str], None],
    ranks: Ranks = ALONE,
) -> Training:
    """Trains a student and leaves it in the state that held-out samples liked best.

    Args:
        student: What is trained.
        objective: Its loss.
        schedule: How long and how fast.
        fitted: Samples to learn from.
        judging: Samples that only judge.
        folder: Where a killed run finds its last check; `None` keeps nothing.
        on_step: Told the number of finished steps and a note.
        ranks: The processes that share the samples of a step; every one of them trains the same
            student with the gradients of all.

    Raises:
        CalibrationError: A loss or a gradient is not finite.
    """
    optimizer = _optimizer(student, schedule)
    checks: list[Check] = []
    best = student.snapshot()
    step = 0
    if folder is not None and ranks.first((folder / _STATE).is_file()):
        ranks.spread_file(folder / _STATE, 0)
    saved = _load(folder, student, optimizer)
    if saved is not None:
        checks, best = saved
        step = checks[-1].step
    with student.training():
        if not checks:
            checks = [_check(student, objective, judging, 0)]
        batches = shuffled_batches(objective.prompts, fitted, schedule.batch_size, schedule.seed)
        for samples in islice(batches, step, schedule.steps):
            share = rate_share(step, schedule.steps, schedule.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            loss = _step(student, objective, optimizer, samples, schedule, step, ranks)
            step += 1
            note = f"loss {loss:.4f}"
            if step % schedule.check_every == 0 or step == schedule.steps:
                checks.append(_check(student, objective, judging, step))
                found = checks[-1].figures
                if found.loss < min(check.figures.loss for check in checks[:-1]):
                    best = student.snapshot()
                _save(folder, student, optimizer, checks, best)
                note += f", held out {found.loss:.4f}, divergence {found.divergence:.4f}"
            on_step(step, note)
    student.restore(best)
    return Training(
        checks=tuple(checks),
        best=min(checks, key=lambda check: check.figures.loss),
    )


def _step(
    student: Student,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[int],
    schedule: Schedule,
    step: int,
    ranks: Ranks,
) -> float:
    """One step of the optimizer; returns the loss before it."""
    optimizer.zero_grad()
    total = 0.0
    size = min(schedule.pass_size, -(-len(samples) // ranks.count))
    for start in ranks.own(range(0, len(samples), size)):
        chosen = samples[start : start + size]
        with torch.enable_grad(), student.updated_weights():
            loss = objective.loss(chosen) / len(samples)
        loss.backward()
        total += float(loss.detach())
    if ranks.count > 1:
        total = _add_up(total, student, ranks)
    student.keep_zeros()
    norm = float(torch.nn.utils.clip_grad_norm_(student.parameters().values(), schedule.clip_norm))
    if not math.isfinite(total) or not math.isfinite(norm):
        what = "loss" if not math.isfinite(total) else "gradient"
        raise CalibrationError(
            f"distill: the {what} of step {step + 1} of {schedule.steps} is not finite; a lower "
            f"rate than {schedule.rate:g} may help, or a look at the samples"
        )
    optimizer.step()
    return total


def _add_up(loss: float, student: Student, ranks: Ranks) -> float:
    """Makes gradients those of all ranks; returns the loss of all."""
    losses = np.array([loss])
    ranks.add_up(losses)
    for parameter in student.parameters().values():
        if parameter.grad is None:  # this rank had no sample
            parameter.grad = torch.zeros_like(parameter)
        total = parameter.grad.cpu()
        ranks.add_up(total.numpy())
        parameter.grad.copy_(total)
    return float(losses[0])


def _check(student: Student, objective: Objective, judging: Sequence[int], step: int) -> Check:
    with student.stored_weights():
        figures = objective.figures(judging)
    if not math.isfinite(figures.loss):
        raise CalibrationError(
            f"distill: the held-out loss after {step} steps is not finite; before any step this "
            "is the model's, later a lower rate may help"
        )
    return Check(step=step, figures=figures)


def _optimizer(student: Student, schedule: Schedule) -> torch.optim.AdamW:
    vectors = list(student.vectors.values())
    factors = [
        values for name, values in student.parameters().items() if name not in student.vectors
    ]
    groups = (
        (factors, schedule.rate, schedule.weight_decay),
        # A norm's gain decays to nothing, not to where it began.
        (vectors, schedule.vector_rate, 0.0),
    )
    return torch.optim.AdamW(
        [
            {"params": values, "lr": peak, "peak": peak, "weight_decay": decay}
            for values, peak, decay in groups
            if values
        ],
        betas=(0.9, 0.95),
    )


def _save(
    folder: Path | None,
    student: Student,
    optimizer: torch.optim.Optimizer,
    checks: Sequence[Check],
    best: dict[str, Tensor],
) -> None:
    """Keeps everything that later steps depend on."""
    if folder is None:
        return
    tensors = {f"best/{name}": values.cpu() for name, values in best.items()}
    for name, parameter in student.parameters().items():
        tensors[f"now/{name}"] = parameter.detach().cpu()
        for moment in _MOMENTS if parameter in optimizer.state else ():
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].cpu()
    keep_tensors(folder / _STATE, tensors, {"checks": [asdict(check) for check in checks]})


def _load(
    folder: Path | None, student: Student, optimizer: torch.optim.Optimizer
) -> tuple[list[Check], dict[str, Tensor]] | None:
    """Puts student and optimizer where an earlier run left them; `None` where there was none."""
    found = None if folder is None else find_tensors(folder / _STATE)
    if found is None:
        return None
    tensors, document = found
    checks = [
        Check(step=item["step"], figures=Figures(**item["figures"])) for item in document["checks"]
    ]
    names = student.parameters()
    student.restore({name: tensors[f"now/{name}"] for name in names})
    for name, parameter in names.items():
        if f"{_MOMENTS[0]}/{name}" in tensors:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(checks[-1].step)),
                **{moment: tensors[f"{moment}/{name}"].to(parameter.device) for moment in _MOMENTS},
            }
    return checks, {name: tensors[f"best/{name}"] for name in names}
