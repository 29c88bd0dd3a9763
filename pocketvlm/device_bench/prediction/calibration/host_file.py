"""The calibration of this machine, in the user's cache folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from pocketvlm.device_bench.prediction.calibration.probe_times import ProbeTimes
from pocketvlm.device_bench.prediction.rates import Rates
from pocketvlm.errors import InputError, StorageError
from pocketvlm.json_io import DecodeError, decode, encode, read_json, write_json
from pocketvlm.machine import describe_environment, toolchain_versions

__all__ = [
    "SCHEMA",
    "HostCalibration",
    "calibration_path",
    "keep_calibration",
    "keep_measured",
    "machine_identity",
    "read_calibration",
    "read_measured",
]

SCHEMA = 3
"""The version of the file that this package writes and reads."""

Condition = tuple[str, object, object]
"""What a measurement belongs to, as it was then, and as it is now."""


class Measured(Protocol):
    """What is kept of a measurement of this machine."""

    @property
    def schema(self) -> int:
        """Version of its file."""


MeasuredT = TypeVar("MeasuredT", bound=Measured)


@dataclass(frozen=True, kw_only=True)
class HostCalibration:
    """Rates of this machine, and when they hold.

    Attributes:
        schema: Version of the file.
        processor: The processor that was measured.
        cores: Logical cores that the system showed.
        onnxruntime: Version of the runtime whose kernels were measured.
        measured_at: When, in UTC.
        seconds: How long it took.
        load_average_1m: What else ran, before and after; `None` where the system does not say.
        rates: What was reached.
        probes: What the rates of graphs were fitted to, by the name of the probe.
    """

    schema: int
    processor: str
    cores: int
    onnxruntime: str
    measured_at: str
    seconds: float
    load_average_1m: tuple[float, float] | None
    rates: Rates
    probes: Mapping[str, ProbeTimes]


def calibration_path() -> Path:
    """Where the calibration is kept, in the folder for what can be made again."""
    if sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "pocketvlm" / "host-calibration.json"


def keep_calibration(found: HostCalibration) -> None:
    """Keeps a calibration for `read_calibration`.

    Raises:
        StorageError: It cannot be written.
    """
    keep_measured(calibration_path(), found)


def read_calibration() -> HostCalibration | str:
    """The calibration of this machine, or why there is none that holds."""
    return read_measured(HostCalibration, calibration_path(), SCHEMA, _conditions)


def _conditions(found: HostCalibration) -> Iterator[Condition]:
    processor, cores, runtime = machine_identity()
    yield "processor", found.processor, processor
    yield "number of cores", found.cores, cores
    yield "ONNX Runtime", found.onnxruntime, runtime


def keep_measured(path: Path, found: Measured) -> None:
    """Keeps what was measured on this machine for `read_measured`.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, encode(found))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def read_measured(
    kind: type[MeasuredT],
    path: Path,
    schema: int,
    conditions: Callable[[MeasuredT], Iterable[Condition]],
) -> MeasuredT | str:
    """What was measured on this machine, or why nothing that holds is kept.

    Args:
        kind: The class of the file.
        path: The file.
        schema: The version that is read.
        conditions: Under which it was measured, beside those of now; asked only where there is a
            file, since a plan that needs none should not wait for the machine's facts.
    """
    again = "run pocketvlm bench --calibrate-host"
    if not path.exists():
        return f"this machine is not calibrated; {again}"
    try:
        found = decode(kind, read_json(path, error=InputError))
    except (DecodeError, InputError) as error:
        return f"{path}: not a calibration of this version ({error}); {again}"
    if found.schema != schema:
        return f"{path}: schema {found.schema}, and this version reads {schema}; {again}"
    for what, was, now in conditions(found):
        if was != now:
            return f"{path}: is of another {what} ({was}, and now {now}); {again}"
    return found


def machine_identity() -> tuple[str, int, str]:
    """Processor, logical cores, and version of ONNX Runtime: what a calibration belongs to."""
    facts = describe_environment(1)
    runtime = toolchain_versions(["onnxruntime"])["onnxruntime"]
    return str(facts["processor"]), int(facts["cores"] or 1), str(runtime)
