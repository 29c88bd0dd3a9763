"""The controller of a benchmark: which process runs when.

Arms alternate, process by process, the reference first (ABAB). Every process is new: it loads one
bundle, gives a cold answer, then warm-up answers, then the measured ones, and ends. So drift of the
machine affects all arms equally, every load is a cold start of the process (the system's file cache
is warm, because digests were just checked), peak memory is that of one bundle alone, and the
variation between processes, which is larger than within a process, is in the samples.

A process that fails stays in the result with its reason, and with the answers that it gave before.
Figures that contradict physics or each other are flagged, and so is a machine that was not quiet.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pocketvlm.context import Progress, ProgressCallback, ignore_progress
from pocketvlm.device_bench.arm import Arm, Pair, open_arms
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.prompts import fit_turns
from pocketvlm.device_bench.protocol import BlockJob, EnvironmentJob, Failure, Turn
from pocketvlm.device_bench.result import assemble_measurement
from pocketvlm.device_bench.schedule import Outcome, schedule
from pocketvlm.device_bench.transports.base import Connection, Transport
from pocketvlm.device_bench.transports.host import HostTransport
from pocketvlm.device_bench.workload import Workload
from pocketvlm.errors import PocketVLMError
from pocketvlm.json_io import DecodeError, decode
from pocketvlm.reports.measurement import Environment, Measurement, ProcessStart

__all__ = ["bench_bundles"]

_TIMEOUT_S = 600.0
# An arm that failed twice will fail again; its remaining processes are skipped, with a note.
_MOST_FAILURES = 2


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """One workload in the words of every arm, by the arm's name."""

    workload: Workload
    pictures: tuple[bytes, ...]
    turns: dict[str, tuple[Turn, ...]]


def bench_bundles(
    pairs: Sequence[Pair],
    workloads: Sequence[Workload],
    *,
    transport: Transport | None = None,
    device: str = "host",
    threads: int | None = None,
    timeout_s: float = _TIMEOUT_S,
    on_progress: ProgressCallback = ignore_progress,
) -> tuple[Measurement, ...]:
    """Measures bundles on a device, interleaved, one workload after another.

    Args:
        pairs: Bundles with their runtimes; the first is the reference of all ratios.
        workloads: The workloads; nothing is measured before all of them fit all models.
        transport: Reaches the device; `None` for this host.
        device: Name of the device's profile, for the report.
        threads: Threads of the heavy graphs; `None` for one per physical core.
        timeout_s: Seconds that one process may take, beside its sustained answers.
        on_progress: Called for every process.

    Returns:
        One measurement per workload.

    Raises:
        BundleError: A folder holds no bundle, or a file of it was changed.
        InputError: A picture cannot be read, a workload does not fit a model, a bundle lacks a
            runtime, or the device cannot be reached.
        MissingExtraError: An engine is not installed here.
        UnsupportedError: An engine would be emulated here.
    """
    transport = transport or HostTransport()
    arms = open_arms(pairs, is_host=transport.kind == HostTransport.kind)
    cells = [_fit(workload, arms) for workload in workloads]
    with transport.connect() as connection:
        environment = _describe_device(connection, device, threads, timeout_s)
        places = {arm.bundle.path: connection.install(arm.bundle) for arm in arms}
        folders = {arm.name: places[arm.bundle.path] for arm in arms}
        return tuple(
            _measure(connection, cell, arms, folders, environment, timeout_s, on_progress)
            for cell in cells
        )


def _fit(workload: Workload, arms: Sequence[Arm]) -> _Cell:
    pictures = workload.encoded_pictures()
    by_bundle = {arm.bundle.path: fit_turns(arm.bundle, workload, pictures) for arm in arms}
    return _Cell(
        workload=workload,
        pictures=pictures,
        turns={arm.name: by_bundle[arm.bundle.path] for arm in arms},
    )


def _measure(
    connection: Connection,
    cell: _Cell,
    arms: Sequence[Arm],
    folders: dict[str, str],
    environment: Environment,
    timeout_s: float,
    on_progress: ProgressCallback,
) -> Measurement:
    workload, by_name = cell.workload, {arm.name: arm for arm in arms}
    processes = schedule(workload.repeats, tuple(by_name))
    order: list[ProcessStart] = []
    outcomes: list[Outcome] = []
    started = time.monotonic()
    for done, process in enumerate(processes):
        arm = by_name[process.arm]
        on_progress(Progress(task="bench", done=done, total=len(processes), note=arm.name))
        failed = [one for one in outcomes if one.process.arm == arm.name and one.failure]
        if len(failed) >= _MOST_FAILURES:
            continue
        time.sleep(workload.cool_down_s)
        order.append(ProcessStart(arm=arm.name, at_s=round(time.monotonic() - started, 3)))
        job = BlockJob(
            bundle=folders[arm.name],
            runtime=arm.runtime,
            turns=cell.turns[arm.name],
            new_tokens=workload.new_tokens,
            pictures=tuple(base64.b64encode(one).decode() for one in cell.pictures),
            ignore_eos=workload.ignore_eos,
            warm_ups=workload.warm_ups,
            answers=workload.answers,
            sustained_s=workload.sustained_s,
            threads=environment.threads,
        )
        outcome = _run_block(connection, job, timeout_s + (workload.sustained_s or 0))
        if isinstance(outcome, Failure):
            outcomes.append(Outcome(process=process, block=None, failure=outcome.reason))
        else:
            outcomes.append(Outcome(process=process, block=outcome))
    on_progress(Progress(task="bench", done=len(processes), total=len(processes)))
    return assemble_measurement(
        arms,
        outcomes,
        workload=workload,
        pictures=cell.pictures,
        environment=environment,
        order=order,
    )


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
