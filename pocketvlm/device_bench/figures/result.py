"""The result of a run: figures, ratios, verdicts, notes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from pocketvlm.device_bench.arm import Arm
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.figures.plausibility import Physics, check_plausibility
from pocketvlm.device_bench.figures.summary import (
    paired_ratios,
    relative_spread,
    summarise_later_turn,
    summarise_repeats,
    total_energy,
)
from pocketvlm.device_bench.figures.sustained import summarise_sustained
from pocketvlm.device_bench.figures.thermal import summarise_sensors
from pocketvlm.device_bench.schedule import Outcome
from pocketvlm.device_bench.workload import Workload
from pocketvlm.json_io import encode
from pocketvlm.reports.measurement import (
    Environment,
    Latency,
    MeasuredArm,
    MeasuredBundle,
    MeasuredWorkload,
    Measurement,
    Memory,
    ProcessFailure,
    ProcessStart,
    Stability,
)

__all__ = ["assemble_measurement"]

# On a quiet machine the middle 80 % of the samples lie within a few per cent of their median.
_SPREAD_BOUND = 0.15
_GUARDED = ("ttft_user_ms", "decode_tok_s")


def assemble_measurement(
    arms: Sequence[Arm],
    outcomes: Sequence[Outcome],
    *,
    workload: Workload,
    pictures: Sequence[bytes],
    environment: Environment,
    ended: str | None = None,
) -> Measurement:
    """Combines the measurements of all processes.

    Args:
        arms: The arms, the reference first.
        outcomes: What came of every process that was started.
        workload: The workload that was measured.
        pictures: Its encoded pictures.
        environment: The device.
        ended: Why the run ended early, if it did.
    """
    by_arm = {arm.name: [one for one in outcomes if one.process.arm == arm.name] for arm in arms}
    reference = arms[0].name
    measured = {
        arm.name: _measure_arm(
            arm,
            by_arm[arm.name],
            environment,
            reference=None if arm.name == reference else by_arm[reference],
        )
        for arm in arms
    }
    return Measurement(
        workload=_describe_workload(workload, pictures),
        environment=environment,
        reference=reference,
        arms=measured,
        order=tuple(ProcessStart(arm=one.process.arm, at_s=one.started_s) for one in outcomes),
        notes=(
            *([] if ended is None else [f"the run ended early: {ended}"]),
            *(note for arm in arms for note in _notes(arm, by_arm[arm.name], workload)),
            *_compare_answers(arms, by_arm),
            *(note for name, arm in measured.items() for note in _verdicts(name, arm)),
            *_noise(reference, measured[reference].stability),
        ),
    )


def _measure_arm(
    arm: Arm,
    outcomes: Sequence[Outcome],
    environment: Environment,
    *,
    reference: Sequence[Outcome] | None,
) -> MeasuredArm:
    bundle, blocks = arm.describe(), _blocks(outcomes)
    failures = tuple(
        ProcessFailure(
            repeat=one.process.repeat,
            reason=one.failure,
            answers=0 if one.block is None else len(one.block.answers),
        )
        for one in outcomes
        if one.failure is not None
    )
    sensors = summarise_sensors(outcomes)
    if not blocks:
        reason = failures[-1].reason if failures else "it was never run"
        return MeasuredArm(
            runtime=arm.runtime,
            bundle=bundle,
            latency=Latency(failed=reason),
            sensors=sensors,
            failures=failures,
        )
    in_order = [blocks[repeat] for repeat in sorted(blocks)]
    latency = summarise_repeats(blocks)
    memory = _largest_memory(blocks.values())
    ratio_samples = {} if reference is None else paired_ratios(blocks, _blocks(reference))
    first = in_order[0]
    turns = max(len(block.later_turns) for block in in_order)
    return MeasuredArm(
        runtime=arm.runtime,
        bundle=bundle,
        prompt=first.prompt,
        latency=latency,
        later_turns=tuple(summarise_later_turn(in_order, turn) for turn in range(turns)),
        memory=memory,
        sustained=next(filter(None, map(summarise_sustained, in_order)), None),
        sensors=sensors,
        energy=total_energy([block.energy for block in in_order if block.energy is not None]),
        ratios={name: median(values) for name, values in ratio_samples.items()},
        ratio_samples=ratio_samples,
        stability=_stability(latency),
        plausibility=check_plausibility(
            latency, memory, _physics(first, bundle, environment), sensors
        ),
        failures=failures,
    )


def _blocks(outcomes: Iterable[Outcome]) -> dict[int, Block]:
    """The measurement of each process that measured something, by repeat."""
    return {one.process.repeat: one.block for one in outcomes if one.block is not None}


def _physics(block: Block, bundle: MeasuredBundle, environment: Environment) -> Physics:
    """What the figures of an arm must not contradict."""
    return Physics(
        prompt_tokens=block.cold.prompt_tokens,
        weight_bytes=bundle.graph_bytes or 0,
        decoder_bytes=bundle.decoder_weight_bytes,
        memory_read_bytes_s=environment.memory_read_bytes_s,
        cache_bytes=environment.last_level_cache_bytes,
    )


def _largest_memory(blocks: Iterable[Block]) -> Memory:
    """The largest of every count, over processes that each held this bundle alone."""
    rows = [encode(block.memory) for block in blocks]
    largest = {
        name: max(counts)
        for name in rows[0]
        if name.endswith("_bytes")
        and (counts := [row[name] for row in rows if row[name] is not None])
    }
    return Memory(counter=rows[0]["counter"], **largest)


def _stability(latency: Latency) -> Stability:
    """How much samples of an arm vary."""
    spread = {
        name: relative_spread(latency.figure(name).samples)
        for name in _GUARDED
        if latency.figure(name).samples
    }
    return Stability(
        spread=spread,
        bound=_SPREAD_BOUND,
        is_stable=bool(spread) and max(spread.values()) <= _SPREAD_BOUND,
    )


def _describe_workload(workload: Workload, pictures: Sequence[bytes]) -> MeasuredWorkload:
    return MeasuredWorkload(
        name=workload.name,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        image_size=workload.image_size,
        pictures=len(pictures),
        image_files=tuple(file.name for file in workload.image_files),
        visual_tokens=workload.vision.visual_tokens,
        resolution=workload.vision.resolution,
        turns=workload.turns,
        warm_ups=workload.warm_ups,
        answers=workload.answers,
        repeats=workload.repeats,
        cool_down_s=workload.cool_down_s,
        sustained_s=workload.sustained_s,
        ignore_eos=workload.ignore_eos,
        image_sha256=tuple(hashlib.sha256(one).hexdigest() for one in pictures),
        sampling="greedy",
    )


def _notes(arm: Arm, outcomes: Sequence[Outcome], workload: Workload) -> Iterable[str]:
    """What happened to an arm's processes."""
    failed = [one for one in outcomes if one.failure is not None]
    for one in failed:
        kept = f" ({len(one.block.answers)} answers are kept)" if one.block is not None else ""
        yield f"{arm.name}, repeat {one.process.repeat + 1}: failed: {one.failure}{kept}"
    missing = workload.repeats - len(outcomes)
    if missing:
        why = f", after {len(failed)} failures" if failed else ""
        yield f"{arm.name}: {missing} of {workload.repeats} repeats were not run{why}"
    warm = sum(not one.wait.is_cool for one in outcomes)
    if warm:
        yield f"{arm.name}: {warm} processes started above the thermal limit: waiting took too long"
    whole = [one.block for one in outcomes if one.block is not None and one.failure is None]
    if len({block.token_ids for block in whole}) > 1 or not all(
        block.is_repeatable for block in whole
    ):
        yield f"{arm.name}: the same prompt did not give the same tokens every time"


def _compare_answers(arms: Sequence[Arm], by_arm: Mapping[str, Sequence[Outcome]]) -> Iterable[str]:
    """Where two runtimes of one bundle part: equal logits to three digits are not equal text."""
    told: dict[Path, tuple[str, tuple[int, ...]]] = {}
    for arm in arms:
        answers = (one.block.token_ids for one in by_arm[arm.name] if one.block is not None)
        token_ids = next(filter(None, answers), ((),))[0]
        first, theirs = told.setdefault(arm.bundle.path, (arm.name, token_ids))
        pairs = list(zip(theirs, token_ids, strict=False))
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        if same < len(pairs):
            yield (
                f"{arm.name}: its answer parts from that of {first} after {same} of "
                f"{len(pairs)} tokens"
            )


def _verdicts(name: str, arm: MeasuredArm) -> Iterable[str]:
    """Checks that an arm's figures failed."""
    for check in arm.plausibility:
        if check.verdict == "fail" and check.value is not None and check.bound is not None:
            yield (
                f"{name}: implausible, not published: {', '.join(check.figures)}: {check.check}: "
                f"{check.value:.4g} against {check.bound:.4g} ({check.detail})"
            )


def _noise(reference: str, stability: Stability | None) -> Iterable[str]:
    """Whether the machine was quiet, as the reference's samples say."""
    if stability is not None and stability.spread and not stability.is_stable:
        name, spread = max(stability.spread.items(), key=lambda item: item[1])
        yield (
            f"noisy run: {name} of {reference} varies by {spread:.0%} of its median, more than "
            f"{_SPREAD_BOUND:.0%}; repeat it on a quiet machine"
        )
