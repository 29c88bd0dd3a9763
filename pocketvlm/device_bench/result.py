"""The result of a comparison: figures, ratios, verdicts, notes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from pocketvlm.device_bench.arm import Arm
from pocketvlm.device_bench.graph_bytes import TARGET
from pocketvlm.device_bench.plausibility import check_plausibility
from pocketvlm.device_bench.summary import paired_ratios, relative_spread
from pocketvlm.device_bench.workload import Workload
from pocketvlm.reports.measurement import (
    Environment,
    Latency,
    MeasuredWorkload,
    Measurement,
    PlausibilityCheck,
    ProcessFailure,
    ProcessStart,
    Stability,
)

__all__ = ["assemble_measurement"]

# On a quiet machine the middle 80 % of the samples lie within a few per cent of their median.
_SPREAD_BOUND = 0.15
_GUARDED = ("ttft_user_ms", "decode_tok_s")


def assemble_measurement(
    arms: Mapping[str, Arm],
    workload: Workload,
    image: bytes | None,
    environment: Environment,
    order: Sequence[ProcessStart],
) -> Measurement:
    """Combines the measurements of all processes.

    Args:
        arms: `candidate`, and `baseline` if there is one.
        workload: The workload that was measured.
        image: The encoded picture, or `None` for text alone.
        environment: The device.
        order: The processes that were started.
    """
    candidate, baseline = arms["candidate"], arms.get("baseline")
    latency = {role: arm.latency() for role, arm in arms.items()}
    memory = {role: arm.memory() for role, arm in arms.items()}
    ratio_samples = paired_ratios(candidate.blocks, baseline.blocks) if baseline else {}
    plausibility = tuple(
        check
        for role, arm in arms.items()
        if arm.blocks
        for check in check_plausibility(role, latency[role], memory[role], arm.physics(environment))
    )
    reference = "baseline" if baseline else "candidate"
    stability = _stability(reference, latency[reference])
    return Measurement(
        workload=_describe_workload(workload, image, candidate),
        environment=environment,
        bundles={role: arm.describe() for role, arm in arms.items()},
        latency={TARGET: latency["candidate"]},
        baseline={TARGET: latency["baseline"]} if baseline else None,
        ratios={name: median(values) for name, values in ratio_samples.items()},
        ratio_samples=ratio_samples,
        memory=replace(memory["candidate"], baseline=memory.get("baseline")),
        stability=stability,
        plausibility=plausibility,
        order=tuple(order),
        failures=tuple(
            ProcessFailure(role=role, repeat=repeat, reason=reason)
            for role, arm in arms.items()
            for repeat, reason in arm.failures.items()
        ),
        notes=_notes(arms, workload, stability, plausibility),
    )


def _stability(role: str, latency: Latency) -> Stability:
    """How much samples of the reference vary."""
    spread = {
        name: relative_spread(latency.figure(name).samples)
        for name in _GUARDED
        if latency.figure(name).samples
    }
    return Stability(
        of=role,
        spread=spread,
        bound=_SPREAD_BOUND,
        is_stable=bool(spread) and max(spread.values()) <= _SPREAD_BOUND,
    )


def _describe_workload(workload: Workload, image: bytes | None, candidate: Arm) -> MeasuredWorkload:
    return MeasuredWorkload(
        name=workload.name,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        image_size=workload.image_size,
        image_file=None if workload.image_file is None else workload.image_file.name,
        warm_ups=workload.warm_ups,
        answers=workload.answers,
        repeats=workload.repeats,
        cool_down_s=workload.cool_down_s,
        ignore_eos=workload.ignore_eos,
        image_sha256=None if image is None else hashlib.sha256(image).hexdigest(),
        prompt=next((block.prompt for block in candidate.blocks.values()), None),
        sampling="greedy",
    )


def _notes(
    arms: Mapping[str, Arm],
    workload: Workload,
    stability: Stability,
    plausibility: Sequence[PlausibilityCheck],
) -> tuple[str, ...]:
    notes = [
        f"{role}, repeat {repeat + 1}: failed: {reason}"
        for role, arm in arms.items()
        for repeat, reason in arm.failures.items()
    ]
    for role, arm in arms.items():
        missing = workload.repeats - len(arm.blocks) - len(arm.failures)
        if missing:
            failures = len(arm.failures)
            notes.append(f"{role}: {missing} repeats were skipped after {failures} failures")
        answers = {block.token_ids for block in arm.blocks.values()}
        if len(answers) > 1 or not all(block.is_repeatable for block in arm.blocks.values()):
            notes.append(f"{role}: the same prompt did not give the same tokens every time")
    if stability.spread and not stability.is_stable:
        name, spread = max(stability.spread.items(), key=lambda item: item[1])
        notes.append(
            f"noisy run: {name} of the {stability.of} varies by {spread:.0%} of its median, "
            f"more than {_SPREAD_BOUND:.0%}; repeat it on a quiet machine"
        )
    notes += [
        f"{check.role}: implausible: {check.check}: {check.value:.4g} against {check.bound:.4g} "
        f"({check.detail})"
        for check in plausibility
        if check.verdict == "fail" and check.value is not None and check.bound is not None
    ]
    return tuple(notes)
