"""The controller of a benchmark: which process runs when.

Arms alternate, process by process, the reference first (ABAB). Every process is new: it loads one
bundle, gives a cold answer, then warm-up answers, then the measured ones, and ends. So drift of the
machine affects all arms equally, every load is a cold start of the process (the system's file cache
is warm, because digests were just checked), peak memory is that of one bundle alone, and the
variation between processes, which is larger than within a process, is in the samples.

A process that fails stays in the result with its reason, and with the answers that it gave before.
When the device itself is gone, or the run is interrupted, what was measured until then is its
result.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pocketvlm.context import Progress, ProgressCallback, ignore_progress
from pocketvlm.device_bench.arm import Arm, Pair, open_arms
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.controller.contradictions import find_contradiction
from pocketvlm.device_bench.controller.cooling import Cooling, Wait, read_sensors, wait_until_cool
from pocketvlm.device_bench.controller.predictions import Predictable, predict_beside
from pocketvlm.device_bench.controller.prompts import fit_turns
from pocketvlm.device_bench.controller.recovery import recover_block
from pocketvlm.device_bench.controller.shown import show_pictures
from pocketvlm.device_bench.devices import Device, load_device
from pocketvlm.device_bench.figures.result import assemble_measurement
from pocketvlm.device_bench.prediction.work import read_work
from pocketvlm.device_bench.protocol import BlockJob, EnvironmentJob, Event, Failure, Turn
from pocketvlm.device_bench.schedule import Outcome, Process, schedule
from pocketvlm.device_bench.transports.base import Connection, Transport
from pocketvlm.device_bench.transports.host import HostTransport
from pocketvlm.device_bench.workload import Workload
from pocketvlm.errors import PocketVLMError
from pocketvlm.json_io import DecodeError, decode
from pocketvlm.reports.measurement import Environment, Measurement

__all__ = ["BenchInterrupted", "BenchOptions", "bench_bundles"]

# An arm that failed twice will fail again; its remaining processes are skipped, with a note.
_MOST_FAILURES = 2


class BenchInterrupted(KeyboardInterrupt):
    """A run was interrupted after something had been measured.

    Attributes:
        results: What was measured until then, as `bench_bundles` returns it.
    """

    def __init__(self, results: tuple[Measurement, ...]) -> None:
        super().__init__()
        self.results = results


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How a run is made.

    Attributes:
        device: Name of the device, or of its profile, for the report.
        threads: Threads of the heavy graphs; `None` for one per physical core.
        timeout_s: Seconds that one process may take, beside its sustained answers.
        cooling: What to wait for before every process; `None` for nothing.
        profile: What is known of the device, for predictions; `None` for nothing, and for this
            host, of which a calibration tells.
    """

    device: str = "host"
    threads: int | None = None
    timeout_s: float = 600.0
    cooling: Cooling | None = None
    profile: Device | None = None


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """One workload in the words of every arm, by the arm's name, and what is known of the arms."""

    workload: Workload
    pictures: tuple[bytes, ...]
    turns: dict[str, tuple[Turn, ...]]
    known: dict[str, Predictable]


@dataclass(frozen=True, kw_only=True)
class _Session:
    """An open connection, and what is on its device.

    Attributes:
        connection: The connection.
        folders: The bundle of each arm on the device.
        environment: The device.
        options: How the run is made.
        has_real_time: Whether the device's seconds are those of this machine.
    """

    connection: Connection
    folders: dict[str, str]
    environment: Environment
    options: BenchOptions
    has_real_time: bool


def bench_bundles(
    pairs: Sequence[Pair],
    workloads: Sequence[Workload],
    *,
    transport: Transport | None = None,
    options: BenchOptions | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> tuple[Measurement, ...]:
    """Measures bundles on a device, interleaved, one workload after another.

    Args:
        pairs: Bundles with their runtimes; the first is the reference of all ratios.
        workloads: The workloads; nothing is measured before all of them fit all models.
        transport: Reaches the device; `None` for this host.
        options: How the run is made; `None` for the defaults.
        on_progress: Called for every process.

    Returns:
        One measurement per workload.

    Raises:
        BenchInterrupted: The run was interrupted; it has what was measured.
        BundleError: A folder holds no bundle, or a file of it was changed.
        InputError: A picture cannot be read, a workload does not fit a model, a bundle lacks a
            runtime, the device cannot be reached, or does not tell what is waited for.
        MissingExtraError: An engine is not installed here.
        UnsupportedError: An engine would be emulated here.
    """
    transport, options = transport or HostTransport(), options or BenchOptions()
    is_host = transport.kind == HostTransport.kind
    arms = open_arms(pairs, is_host=is_host)
    cells = [_fit(workload, arms) for workload in workloads]
    with transport.connect() as connection:
        environment = _describe_device(connection, options)
        if options.cooling is not None:
            options.cooling.require_sensors(read_sensors(connection))
        places = {arm.bundle.path: connection.install(arm.bundle) for arm in arms}
        session = _Session(
            connection=connection,
            folders={arm.name: places[arm.bundle.path] for arm in arms},
            environment=environment,
            options=options,
            has_real_time=transport.has_real_time,
        )
        by_cell: list[list[Outcome]] = [[] for _ in cells]
        ended: str | None = None
        interrupt: KeyboardInterrupt | None = None
        try:
            for cell, outcomes in zip(cells, by_cell, strict=True):
                if ended is None:
                    ended = _measure(session, cell, arms, outcomes, on_progress)
        except KeyboardInterrupt as found:
            if not any(by_cell):
                raise
            ended, interrupt = "it was interrupted", found
        profile = options.profile or (load_device("host") if is_host else None)
        results = tuple(
            predict_beside(
                assemble_measurement(
                    arms,
                    outcomes,
                    workload=cell.workload,
                    pictures=cell.pictures,
                    environment=environment,
                    ended=ended,
                ),
                cell.known,
                profile,
            )
            for cell, outcomes in zip(cells, by_cell, strict=True)
        )
    if interrupt is not None:
        raise BenchInterrupted(results) from interrupt
    return results


def _fit(workload: Workload, arms: Sequence[Arm]) -> _Cell:
    pictures = workload.encoded_pictures()
    bundles = {arm.bundle.path: arm.bundle for arm in arms}
    known = {
        path: Predictable(
            manifest=bundle.manifest,
            work=read_work(bundle),
            shown=show_pictures(bundle, pictures, workload.vision),
        )
        for path, bundle in bundles.items()
    }
    turns = {
        path: fit_turns(bundle, workload, known[path].shown) for path, bundle in bundles.items()
    }
    return _Cell(
        workload=workload,
        pictures=pictures,
        turns={arm.name: turns[arm.bundle.path] for arm in arms},
        known={arm.name: known[arm.bundle.path] for arm in arms},
    )


def _measure(
    session: _Session,
    cell: _Cell,
    arms: Sequence[Arm],
    outcomes: list[Outcome],
    on_progress: ProgressCallback,
) -> str | None:
    """Runs every process of one workload; appends to `outcomes`, so that an interrupt keeps them.

    Returns:
        Why the run ended early, if the device is gone.
    """
    workload, by_name = cell.workload, {arm.name: arm for arm in arms}
    processes = schedule(workload.repeats, tuple(by_name))
    started = time.monotonic()
    for done, process in enumerate(processes):
        on_progress(Progress(task="bench", done=done, total=len(processes), note=process.arm))
        failed = [one for one in outcomes if one.process.arm == process.arm and one.failure]
        if len(failed) >= _MOST_FAILURES:
            continue
        time.sleep(workload.cool_down_s)
        cooling = session.options.cooling
        wait = Wait() if cooling is None else wait_until_cool(session.connection, cooling)
        started_s = round(time.monotonic() - started, 3)
        outcome = _run_process(session, cell, by_name[process.arm], process)
        outcomes.append(replace(outcome, started_s=started_s, wait=wait))
        if outcome.failure is not None and not _is_there(session):
            return f"the device is gone: {outcome.failure}"
    on_progress(Progress(task="bench", done=len(processes), total=len(processes)))
    return None


def _run_process(session: _Session, cell: _Cell, arm: Arm, process: Process) -> Outcome:
    """Runs one process; one that died has the block that its events tell."""
    workload = cell.workload
    # A sustained run heats the device: only the last process of an arm has one.
    is_last = process.repeat == workload.repeats - 1
    sustained_s = workload.sustained_s if is_last else None
    job = BlockJob(
        bundle=session.folders[arm.name],
        runtime=arm.runtime,
        turns=cell.turns[arm.name],
        new_tokens=workload.new_tokens,
        pictures=tuple(base64.b64encode(one).decode() for one in cell.pictures),
        vision=workload.vision,
        ignore_eos=workload.ignore_eos,
        warm_ups=workload.warm_ups,
        answers=workload.answers,
        sustained_s=sustained_s,
        threads=session.environment.threads,
    )
    events: list[Event] = []
    started = time.monotonic()
    found = session.connection.run(
        job, timeout_s=session.options.timeout_s + (sustained_s or 0), on_event=events.append
    )
    elapsed_s = time.monotonic() - started if session.has_real_time else None
    reason = found.reason if isinstance(found, Failure) else None
    block: Block | None = None
    if isinstance(found, Failure):
        block = recover_block(found.events)
    else:
        try:
            block = decode(Block, found)
        except DecodeError as fault:
            reason = f"the runner's result is not a block: {fault}"
            block = recover_block(events)
    if block is not None:
        wrong = find_contradiction(block, job, events, elapsed_s=elapsed_s, is_whole=reason is None)
        if wrong is not None:
            failure = f"the runner contradicts itself: {wrong}"
            return Outcome(process=process, block=None, failure=reason or failure)
        text_sha256 = hashlib.sha256(job.turns[0].text.encode()).hexdigest()
        block = replace(block, prompt=replace(block.prompt, text_sha256=text_sha256))
    return Outcome(process=process, block=block, failure=reason)


def _describe_device(connection: Connection, options: BenchOptions) -> Environment:
    job = EnvironmentJob(threads=options.threads)
    found = connection.run(job, timeout_s=options.timeout_s)
    if isinstance(found, Failure):
        raise PocketVLMError(f"the device does not answer: {found.reason}")
    try:
        return decode(Environment, {**found, "device": options.device}, "environment")
    except DecodeError as fault:
        raise PocketVLMError(f"the device describes itself wrongly: {fault}") from fault


def _is_there(session: _Session) -> bool:
    """Whether the device still answers, after a process failed."""
    job = EnvironmentJob(threads=session.environment.threads)
    found = session.connection.run(job, timeout_s=session.options.timeout_s)
    return not isinstance(found, Failure)
