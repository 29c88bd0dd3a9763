"""The protocol: what runs when, and what becomes of it.

Baseline and candidate take turns, process by process (ABAB). Every process is fresh: it loads one
bundle, gives a cold answer, then warm-up answers, then the measured ones, and ends. So the drift of
a machine hits both alike, every load is a cold start of the process (the system's file cache is
warm, since digests were just checked), peak memory is that of one bundle alone, and the scatter
between processes, which is larger than the one inside a process, is in the samples.

A process that fails stays in the result with its reason. Figures that contradict physics or
themselves are flagged, and so is a machine that was not quiet.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pocketvlm.bundle import Bundle
from pocketvlm.context import Progress, ProgressCallback, ignore_progress
from pocketvlm.device_bench.devices import load_device
from pocketvlm.device_bench.graph_bytes import decoder_weight_bytes, graph_file_bytes
from pocketvlm.device_bench.host import Failure, HostTransport, Transport
from pocketvlm.device_bench.plausibility import Physics, check_plausibility
from pocketvlm.device_bench.summary import paired_ratios, relative_spread, summarise_blocks
from pocketvlm.device_bench.workload import Workload
from pocketvlm.errors import PocketVLMError, UnsupportedError
from pocketvlm.files.reader import file_sha256
from pocketvlm.runtime.engines import EMULATED, choose_engine

__all__ = ["Turn", "bench_bundle", "schedule"]

_TARGET = "onnx"
_TIMEOUT_S = 600.0
# A bundle that failed twice will fail again; its remaining turns are skipped, and say so.
_MOST_FAILURES = 2
# The middle 80 % of the samples of a quiet machine lie within a few per cent of their median.
_SPREAD_BOUND = 0.15
_GUARDED = ("ttft_user_ms", "decode_tok_s")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One process: which bundle, and the number of the repeat."""

    role: str
    repeat: int


@dataclass(kw_only=True)
class _Arm:
    """One bundle of the comparison, and what was measured of it so far."""

    bundle: Bundle
    blocks: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)


def schedule(repeats: int, roles: Sequence[str]) -> tuple[Turn, ...]:
    """The order of the processes: every role once in every repeat, always in the same order."""
    return tuple(Turn(role=role, repeat=repeat) for repeat in range(repeats) for role in roles)


def bench_bundle(
    bundle: Path,
    workload: Workload,
    *,
    baseline: Path | None = None,
    device: str = "host",
    threads: int | None = None,
    timeout_s: float = _TIMEOUT_S,
    transport: Transport | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> dict[str, Any]:
    """Measures a bundle, beside a baseline where one is given.

    Args:
        bundle: The bundle to measure.
        workload: On what.
        baseline: A bundle that takes turns with it.
        device: Name of a device profile.
        threads: Threads of the heavy graphs; `None` for one a physical core.
        timeout_s: Seconds that one process may take.
        transport: The way to the device; `None` for the one of its profile.
        on_progress: Told about every process that ended.

    Returns:
        The blocks `workload`, `environment`, `bundles`, `latency`, `baseline`, `ratios`,
        `ratio_samples`, `memory`, `stability`, `plausibility`, `order`, `failures` and `notes` of
        a report; `docs/benchmarking.md` defines them.

    Raises:
        BundleError: There is no bundle, or a file of it was changed.
        InputError: The workload's picture cannot be read.
        UnsupportedError: The device is known, and there is no way to reach it.
    """
    image = workload.image_bytes()
    arms = {} if baseline is None else {"baseline": _Arm(bundle=Bundle.open(baseline))}
    arms["candidate"] = _Arm(bundle=Bundle.open(bundle))
    for arm in arms.values():
        _require_engine(arm.bundle)
    transport = transport or _transport_to(device)
    environment = _describe_device(transport, threads, timeout_s)
    turns = schedule(workload.repeats, tuple(arms))
    order = []
    started = time.monotonic()
    for done, turn in enumerate(turns):
        arm = arms[turn.role]
        on_progress(Progress(task="bench", done=done, total=len(turns), note=turn.role))
        if len(arm.failures) >= _MOST_FAILURES:
            continue
        time.sleep(workload.cool_down_s)
        order.append({"role": turn.role, "at_s": round(time.monotonic() - started, 3)})
        job = _block_job(arm.bundle.path, workload, image, environment["threads"])
        outcome = transport.run(job, timeout_s=timeout_s)
        if isinstance(outcome, Failure):
            arm.failures.append(
                {"role": turn.role, "repeat": turn.repeat, "reason": outcome.reason}
            )
        else:
            arm.blocks[turn.repeat] = outcome
    on_progress(Progress(task="bench", done=len(turns), total=len(turns)))
    return _assemble(arms, workload, image, environment, device, order)


def _require_engine(bundle: Bundle) -> None:
    """What computes a target in the place of its engine gives its answers, not its speed."""
    name = choose_engine(bundle)
    if name in EMULATED:
        raise UnsupportedError(
            f"{bundle.path}: has graphs for {name} alone, whose engine is not on this host; "
            "`pocketvlm verify-coreml` times them on an Apple machine"
        )


def _transport_to(device: str) -> Transport:
    profile = load_device(device)
    if profile.transport != "host":
        raise UnsupportedError(
            f"device {device!r}: there is no transport to it in this version; its profile serves "
            "plans. Devices that can be measured: host"
        )
    return HostTransport()


def _describe_device(
    transport: Transport, threads: int | None, timeout_s: float
) -> Mapping[str, Any]:
    environment = transport.run({"job": "environment", "threads": threads}, timeout_s=timeout_s)
    if isinstance(environment, Failure):
        raise PocketVLMError(f"the device does not answer: {environment.reason}")
    return environment


def _block_job(path: Path, workload: Workload, image: bytes | None, threads: int) -> dict[str, Any]:
    # The picture travels with the job, so that both bundles see the very same bytes.
    return {
        "job": "block",
        "bundle": str(path.resolve()),
        "workload": workload.to_json(),
        "threads": threads,
        "image_base64": None if image is None else base64.b64encode(image).decode(),
    }


def _assemble(
    arms: Mapping[str, _Arm],
    workload: Workload,
    image: bytes | None,
    environment: Mapping[str, Any],
    device: str,
    order: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    candidate, baseline = arms["candidate"], arms.get("baseline")
    latency = {role: _latency(arm) for role, arm in arms.items()}
    memory = {role: _memory(arm) for role, arm in arms.items()}
    ratio_samples = paired_ratios(candidate.blocks, baseline.blocks) if baseline else {}
    plausibility = [
        {"role": role, **check.to_json()}
        for role, arm in arms.items()
        if arm.blocks
        for check in check_plausibility(latency[role], memory[role], _physics(arm, environment))
    ]
    stability = _stability(latency["baseline" if baseline else "candidate"], bool(baseline))
    failures = [failure for arm in arms.values() for failure in arm.failures]
    return {
        "workload": _describe_workload(workload, image, candidate),
        "environment": {**environment, "device": device},
        "bundles": {role: _describe_bundle(arm) for role, arm in arms.items()},
        "latency": {_TARGET: latency["candidate"]},
        "baseline": {_TARGET: latency["baseline"]} if baseline else None,
        "ratios": {name: median(values) for name, values in ratio_samples.items()},
        "ratio_samples": ratio_samples,
        "memory": {
            **memory["candidate"],
            **({"baseline": memory["baseline"]} if baseline else {}),
        },
        "stability": stability,
        "plausibility": plausibility,
        "order": list(order),
        "failures": failures,
        "notes": _notes(arms, workload, stability, plausibility),
    }


def _latency(arm: _Arm) -> dict[str, Any]:
    if arm.blocks:
        return summarise_blocks([arm.blocks[repeat] for repeat in sorted(arm.blocks)])
    return {"failed": arm.failures[-1]["reason"] if arm.failures else "it was never run"}


def _memory(arm: _Arm) -> dict[str, Any]:
    """The worst of the processes, each of which held this bundle alone."""
    rows = [block["memory"] for block in arm.blocks.values()]
    names = ("before_load_rss_bytes", "after_load_rss_bytes", "peak_rss_bytes")
    return {name: max((row[name] for row in rows), default=None) for name in names}


def _physics(arm: _Arm, environment: Mapping[str, Any]) -> Physics:
    block = next(iter(arm.blocks.values()))
    return Physics(
        prompt_tokens=block["prompt"]["tokens"],
        weight_bytes=graph_file_bytes(arm.bundle),
        decoder_bytes=decoder_weight_bytes(arm.bundle),
        memory_read_bytes_s=environment.get("memory_read_bytes_s"),
        cache_bytes=environment.get("last_level_cache_bytes"),
    )


def _stability(figures: Mapping[str, Any], has_baseline: bool) -> dict[str, Any]:
    """How much the reference of the run scattered: the baseline where there is one."""
    spread = {
        name: relative_spread(figures[name]["samples"])
        for name in _GUARDED
        if figures.get(name, {}).get("samples")
    }
    return {
        "of": "baseline" if has_baseline else "candidate",
        "spread": spread,
        "bound": _SPREAD_BOUND,
        "is_stable": bool(spread) and all(value <= _SPREAD_BOUND for value in spread.values()),
    }


def _describe_workload(workload: Workload, image: bytes | None, candidate: _Arm) -> dict[str, Any]:
    prompt = next((block["prompt"] for block in candidate.blocks.values()), None)
    return {
        **workload.to_json(),
        "image_file": None if workload.image_file is None else workload.image_file.name,
        "image_sha256": None if image is None else hashlib.sha256(image).hexdigest(),
        "prompt": prompt,
        "sampling": "greedy",
    }


def _describe_bundle(arm: _Arm) -> dict[str, Any]:
    manifest = arm.bundle.manifest
    return {
        "model": manifest.model,
        "manifest_sha256": file_sha256(arm.bundle.path / "manifest.json"),
        "stored_bytes": arm.bundle.stored_bytes(),
        "decoder_weight_bytes": decoder_weight_bytes(arm.bundle),
        "visual_tokens": manifest.visual_tokens,
        "visual_tokens_full": manifest.visual_tokens_full,
        "kv_dtype": manifest.kv_cache.dtype,
        "precision": {
            part: label
            for component in manifest.components
            if component.target == _TARGET
            for part, label in component.precision.items()
        },
    }


def _notes(
    arms: Mapping[str, _Arm],
    workload: Workload,
    stability: Mapping[str, Any],
    plausibility: Sequence[Mapping[str, Any]],
) -> list[str]:
    notes = [
        f"{failure['role']}, repeat {failure['repeat'] + 1}: failed: {failure['reason']}"
        for arm in arms.values()
        for failure in arm.failures
    ]
    for role, arm in arms.items():
        missing = workload.repeats - len(arm.blocks) - len(arm.failures)
        if missing:
            notes.append(f"{role}: {missing} repeats were skipped after {_MOST_FAILURES} failures")
        answers = {tuple(block["token_ids"]) for block in arm.blocks.values()}
        repeatable = all(block["is_repeatable"] for block in arm.blocks.values())
        if len(answers) > 1 or not repeatable:
            notes.append(f"{role}: the same prompt did not give the same tokens every time")
    if stability["spread"] and not stability["is_stable"]:
        worst = max(stability["spread"].items(), key=lambda item: item[1])
        notes.append(
            f"noisy run: {worst[0]} of the {stability['of']} scatters by {worst[1]:.0%} of its "
            f"median, more than {stability['bound']:.0%}; repeat it on a quiet machine"
        )
    notes += [
        f"{check['role']}: implausible: {check['check']}: {check['value']:.4g} against "
        f"{check['bound']:.4g} ({check['detail']})"
        for check in plausibility
        if check["verdict"] == "fail"
    ]
    return notes
