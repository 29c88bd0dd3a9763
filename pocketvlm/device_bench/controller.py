"""The controller of a benchmark: which process runs when.

Baseline and candidate alternate, process by process (ABAB). Every process is new: it loads one
bundle, gives a cold answer, then warm-up answers, then the measured ones, and ends. So drift of the
machine affects both equally, every load is a cold start of the process (the system's file cache is
warm, because digests were just checked), peak memory is that of one bundle alone, and the variation
between processes, which is larger than within a process, is in the samples.

A process that fails stays in the result with its reason. Figures that contradict physics or each
other are flagged, and so is a machine that was not quiet.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.context import Progress, ProgressCallback, ignore_progress
from pocketvlm.device_bench.arm import Arm
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.devices import load_device
from pocketvlm.device_bench.prompts import fit_turns
from pocketvlm.device_bench.protocol import BlockJob, EnvironmentJob, Failure
from pocketvlm.device_bench.result import assemble_measurement
from pocketvlm.device_bench.transports.base import Connection, Transport
from pocketvlm.device_bench.transports.host import HostTransport
from pocketvlm.device_bench.workload import Workload
from pocketvlm.errors import PocketVLMError, UnsupportedError
from pocketvlm.json_io import DecodeError, decode
from pocketvlm.reports.measurement import Environment, Measurement, ProcessStart
from pocketvlm.runtime.engines import EMULATED, choose_engine

__all__ = ["Process", "bench_bundle", "schedule"]

_TIMEOUT_S = 600.0
# A bundle that failed twice will fail again; its remaining turns are skipped, with a note.
_MOST_FAILURES = 2


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of the schedule: its bundle and the number of the repeat."""

    role: str
    repeat: int


def schedule(repeats: int, roles: Sequence[str]) -> tuple[Process, ...]:
    """The order of the processes: every role once per repeat, always in the same order."""
    return tuple(Process(role=role, repeat=repeat) for repeat in range(repeats) for role in roles)


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
) -> Measurement:
    """Measures a bundle, interleaved with a baseline if one is given.

    Args:
        bundle: The bundle to measure.
        workload: The workload to measure it on.
        baseline: A bundle to alternate with.
        device: Name of a device profile.
        threads: Threads of the heavy graphs; `None` for one per physical core.
        timeout_s: Seconds that one process may take.
        transport: Reaches the device; `None` for the transport of its profile.
        on_progress: Called for every process.

    Raises:
        BundleError: There is no bundle, or a file of it was changed.
        InputError: The workload's picture cannot be read, or the workload does not fit a model.
        UnsupportedError: There is no transport to the device, or no engine for the bundle.
    """
    image = workload.image_bytes()
    arms = {} if baseline is None else {"baseline": Arm(bundle=Bundle.open(baseline))}
    arms["candidate"] = Arm(bundle=Bundle.open(bundle))
    for arm in arms.values():
        _require_engine(arm.bundle)
    turns = {role: fit_turns(arm.bundle, workload, image) for role, arm in arms.items()}
    transport = transport or _transport_to(device)
    processes = schedule(workload.repeats, tuple(arms))
    order = []
    with transport.connect() as connection:
        environment = _describe_device(connection, device, threads, timeout_s)
        folders = {role: connection.install(arm.bundle) for role, arm in arms.items()}
        started = time.monotonic()
        for done, process in enumerate(processes):
            arm = arms[process.role]
            on_progress(Progress(task="bench", done=done, total=len(processes), note=process.role))
            if len(arm.failures) >= _MOST_FAILURES:
                continue
            time.sleep(workload.cool_down_s)
            at_s = round(time.monotonic() - started, 3)
            order.append(ProcessStart(role=process.role, at_s=at_s))
            job = BlockJob(
                bundle=folders[process.role],
                runtime=choose_engine(arm.bundle),
                turns=turns[process.role],
                new_tokens=workload.new_tokens,
                pictures=() if image is None else (base64.b64encode(image).decode(),),
                ignore_eos=workload.ignore_eos,
                warm_ups=workload.warm_ups,
                answers=workload.answers,
                threads=environment.threads,
            )
            outcome = _run_block(connection, job, timeout_s)
            if isinstance(outcome, Failure):
                arm.failures[process.repeat] = outcome.reason
            else:
                arm.blocks[process.repeat] = outcome
    on_progress(Progress(task="bench", done=len(processes), total=len(processes)))
    return assemble_measurement(arms, workload, image, environment, order)


def _require_engine(bundle: Bundle) -> None:
    """An emulator has the answers of an engine, but not its speed."""
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
    connection: Connection, device: str, threads: int | None, timeout_s: float
) -> Environment:
    found = connection.run(EnvironmentJob(threads=threads), timeout_s=timeout_s)
    if isinstance(found, Failure):
        raise PocketVLMError(f"the device does not answer: {found.reason}")
    try:
        return decode(Environment, {**found, "device": device}, "environment")
    except DecodeError as fault:
        raise PocketVLMError(f"the device describes itself wrongly: {fault}") from fault


def _run_block(connection: Connection, job: BlockJob, timeout_s: float) -> Block | Failure:
    outcome = connection.run(job, timeout_s=timeout_s)
    if isinstance(outcome, Failure):
        return outcome
    try:
        return decode(Block, outcome)
    except DecodeError as fault:
        return Failure(reason=f"the runner's result is not a block: {fault}")
