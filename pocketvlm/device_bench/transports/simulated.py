"""A device that is not there: a script says how it behaves.

It is for those who write reports, gates and controllers. What it says takes the way of every
runner's output: lines, which are read as bytes. No figure of it is a measurement, and its
environment says so.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.protocol import (
    BlockJob,
    EnvironmentJob,
    Failure,
    Job,
    Result,
    SensorsJob,
    write_failure,
    write_result,
)
from pocketvlm.device_bench.transports.base import Connection, Transport
from pocketvlm.device_bench.transports.output import EventCallback, RunnerOutput, ignore_event
from pocketvlm.device_bench.transports.push import Room
from pocketvlm.device_bench.transports.remote import least_graph_bytes, require_room
from pocketvlm.device_bench.transports.simulated_runner import (
    BreakError,
    SimulatedProcess,
    read_sensors,
)
from pocketvlm.device_bench.transports.simulation import Simulation, load_simulation
from pocketvlm.errors import InputError
from pocketvlm.json_io import encode

__all__ = ["SimulatedConnection", "SimulatedTransport"]

_KILLED = -9
_ABORTED = -6
_ROOT = "/simulated"


@dataclass(frozen=True, kw_only=True)
class SimulatedTransport(Transport):
    """Reaches a device that a script describes."""

    kind: ClassVar[str] = "simulated"
    has_real_time: ClassVar[bool] = False
    simulation: Simulation = field(default_factory=Simulation)

    @classmethod
    def parse(cls, address: str, runner: Path | None = None) -> Self:
        """Reads the name of a script.

        Raises:
            InputError: There is no such script, or a runner is to be brought there.
        """
        if runner is not None:
            raise InputError("device 'simulated': runs no runner; its script says what one prints")
        if not address:
            raise InputError("device 'simulated': a simulated device is simulated:SCRIPT.yaml")
        return cls(simulation=load_simulation(Path(address)))

    def connect(self) -> SimulatedConnection:
        """Connects, if the script allows it."""
        if not self.simulation.is_reachable:
            raise InputError("simulated: cannot be reached: the script says so")
        return SimulatedConnection(self.simulation)


class SimulatedConnection(Connection):
    """A device that has worked for some time, and has some bundles."""

    def __init__(self, simulation: Simulation) -> None:
        """The device is cool and empty."""
        self._script = simulation
        self._noise = random.Random(simulation.seed)
        self._worked_s = 0.0
        self._processes = 0
        self._vanished = False
        self.installed: list[str] = []

    def install(self, bundle: Bundle) -> str:
        """Takes the time of a transfer."""
        script, size_bytes = self._script, bundle.stored_bytes()
        room = Room(disk_bytes=script.disk_bytes, memory_bytes=script.memory_bytes)
        graph_bytes = least_graph_bytes(bundle)
        require_room(room, size_bytes, graph_bytes, what=str(bundle.path), name="simulated")
        if script.transfer_ends_bytes is not None and size_bytes > script.transfer_ends_bytes:
            raise InputError(
                f"simulated: the connection was lost after {script.transfer_ends_bytes} bytes"
            )
        self._wait(size_bytes / script.transfer_bytes_s)
        self.installed.append(f"{_ROOT}/{bundle.path.resolve().name}")
        return self.installed[-1]

    def run(
        self, job: Job, *, timeout_s: float, on_event: EventCallback = ignore_event
    ) -> Result | Failure:
        """Says what the script says."""
        output = RunnerOutput(on_event)
        if self._vanished:
            return output.failure("the connection to simulated was lost: it does not come back")
        if not isinstance(job, BlockJob):
            output.feed(write_result(self._describe(job)).encode())
            return output.outcome(0, "")
        process = SimulatedProcess(
            script=self._script,
            job=job,
            noise=self._noise,
            worked_s=self._worked_s,
            faults=[fault for fault in self._script.faults if fault.process == self._processes],
        )
        self._processes += 1
        started_s = self._worked_s
        if job.bundle not in self.installed:
            output.feed(write_failure(f"{job.bundle}: no bundle here").encode())
            return output.outcome(2, "")
        if job.runtime not in self._script.runtimes:
            known = ", ".join(self._script.runtimes)
            output.feed(write_failure(f"no engine for {job.runtime}; there is {known}").encode())
            return output.outcome(2, "")
        try:
            for line in process.lines():
                self._wait(process.worked_s - self._worked_s)
                self._worked_s = process.worked_s
                if self._worked_s - started_s > timeout_s:
                    return output.failure(f"no result within {timeout_s:g} s")
                output.feed(line.encode("utf-8", "surrogatepass") + b"\n")
        except BreakError as broken:
            fault = broken.fault
            if fault.kind == "hang":
                return output.failure(f"no result within {timeout_s:g} s")
            if fault.kind in ("disconnect", "unreachable"):
                self._vanished = fault.kind == "unreachable"
                return output.failure("the connection to simulated was lost: the script says so")
            return output.outcome(_KILLED if fault.kind == "out_of_memory" else _ABORTED, "")
        return output.outcome(0, "")

    def close(self) -> None:
        """Removes what was installed."""
        self.installed.clear()

    def _describe(self, job: EnvironmentJob | SensorsJob) -> Result:
        script = self._script
        if isinstance(job, SensorsJob):
            sample: Result = encode(read_sensors(script, self._worked_s, 0.0))
            return sample
        return {
            "os": "simulated",
            "machine": "simulated",
            "processor": script.processor,
            "cores": script.cores,
            "ram_bytes": script.ram_bytes,
            "threads": job.threads or script.cores,
            "memory_read_bytes_s": script.memory_read_bytes_s,
            "last_level_cache_bytes": script.last_level_cache_bytes,
            "temperature_c": script.heat_at(self._worked_s).temperature_c,
            "toolchain": {},
        }

    def _wait(self, seconds: float) -> None:
        if self._script.real_time:
            time.sleep(seconds * self._script.real_time)
