"""Runs recorders: the same questions to one bundle, on this host and on emulated machines."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import Sample
from pocketvlm.child_process import module_command, start_child
from pocketvlm.context import RunContext
from pocketvlm.emulation.arm64.emulator import CPUS, Emulator
from pocketvlm.emulation.arm64.environment import ARCHITECTURE
from pocketvlm.errors import BundleError, CheckFailedError
from pocketvlm.export.parity.prompts import second_turn
from pocketvlm.export.parity.recorder import JOB_FILE, RECORDING_FILE, AskedQuestion, RecordingJob
from pocketvlm.export.parity.recording_file import MachineRecording, read_recording
from pocketvlm.json_io import encode, write_json

__all__ = ["Machine", "Place", "emulated_place", "host_place", "record_at"]

_RECORDER = "pocketvlm.export.parity.recorder"
_STEPS = 4
_TIMEOUT_S = 6 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What recorded: the machine, as the process on it described itself.

    Attributes:
        name: `host` or `arm64`.
        facts: Its architecture and instruction sets, engine, and versions of packages.
        emulator: QEMU's version and the processor that it was; `None` where nothing is emulated.
    """

    name: str
    facts: Mapping[str, Any]
    emulator: Mapping[str, str] | None = None

    def line(self) -> str:
        """The machine in one line."""
        packages = ", ".join(f"{name} {found}" for name, found in self.facts["packages"].items())
        emulated = (
            ""
            if self.emulator is None
            else f", {self.emulator['cpu']} emulated by QEMU {self.emulator['qemu']}"
        )
        return f"{self.facts['machine']}{emulated}, Python {self.facts['python']}, {packages}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a recorder runs.

    Attributes:
        name: `host` or `arm64`.
        command: The recorder, to which the folder of its job is appended.
        variables: Its environment variables; `None` for those of this process.
        emulator: QEMU's version and the processor that it is.
    """

    name: str
    command: Sequence[str]
    variables: Mapping[str, str] | None = None
    emulator: Mapping[str, str] | None = None


def host_place() -> Place:
    """This host."""
    return Place(name="host", command=module_command(_RECORDER))


def emulated_place(emulator: Emulator) -> Place:
    """An emulated ARM64 machine."""
    return Place(
        name=ARCHITECTURE,
        command=emulator.module_command(_RECORDER),
        variables=emulator.variables(),
        emulator={
            "qemu": emulator.version(),
            "cpu": emulator.cpu,
            "stands_for": CPUS[emulator.cpu],
        },
    )


def record_at(
    places: Sequence[Place],
    bundle: Bundle,
    target: str,
    asked: Sequence[Sample],
    *,
    tokens: int,
    ctx: RunContext,
) -> list[tuple[Machine, MachineRecording]]:
    """Asks a bundle the same questions everywhere, one place after the other.

    Args:
        places: The places.
        bundle: The bundle.
        target: The engine that runs it.
        asked: Questions about pictures.
        tokens: Longest greedy answer.
        ctx: Threads and progress.

    Raises:
        BundleError: It cannot be run somewhere.
        CheckFailedError: A recorder ended without a recording.
    """
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = RecordingJob(
            bundle=str(bundle.path.resolve()),
            runtime=target,
            threads=ctx.threads,
            tokens=tokens,
            questions=tuple(_ask(sample, number, folder) for number, sample in enumerate(asked)),
        )
        write_json(folder / JOB_FILE, encode(job))
        for place in places:
            facts = _record(place, folder, ctx)
            machine = Machine(name=place.name, facts=facts, emulator=place.emulator)
            found.append((machine, read_recording(folder / RECORDING_FILE)))
            (folder / RECORDING_FILE).unlink()
    return found


def _ask(sample: Sample, number: int, folder: Path) -> AskedQuestion:
    """Puts a sample's pictures into the job's folder, the bytes of their files unchanged."""
    names = []
    for place, image in enumerate(sample.images):
        name = f"{number}-{place}.picture"
        if isinstance(image, Path):
            shutil.copyfile(image, folder / name)
        else:
            image.save(folder / name, format="PNG")
        names.append(name)
    return AskedQuestion(
        pictures=tuple(names),
        messages=tuple(sample.messages()),
        follow_up=tuple(second_turn(sample)),
    )


def _record(place: Place, folder: Path, ctx: RunContext) -> dict[str, Any]:
    """Runs the recorder; returns what it says about its machine.

    Raises:
        BundleError: It could not use the bundle.
        CheckFailedError: It ended without a result.
    """
    task = f"verify {place.name}"
    last = ""
    with (
        (folder / "stderr").open("w+", encoding="utf-8", errors="replace") as errors,
        start_child(
            [*place.command, str(folder)],
            variables=place.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        watch = threading.Timer(_TIMEOUT_S, process.kill)
        watch.start()
        try:
            for line in process.stdout or ():
                last = line.strip() or last
                event = _parse_line(last)
                if event.get("event") == "step":
                    ctx.report(task, int(event["done"]), _STEPS, str(event["note"]))
            process.wait()
        finally:
            watch.cancel()
        errors.seek(0)
        written = errors.read().strip().splitlines()
    found = _parse_line(last)
    if found.get("status") == "failed":
        raise BundleError(f"{place.name}: {found.get('reason')}")
    machine = found.get("machine")
    if found.get("status") != "ok" or not isinstance(machine, dict):
        code = process.returncode
        ending = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        said = (written[-1:] or [last])[0]
        raise CheckFailedError(f"{place.name}: the recorder {ending}, without a result: {said}")
    return machine


def _parse_line(line: str) -> dict[str, Any]:
    """A line that is a JSON object; empty for any other."""
    try:
        document = json.loads(line)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
