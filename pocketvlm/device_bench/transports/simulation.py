"""The script of a simulated device: how fast it is, how it warms up, and what goes wrong.

Every key has a default, so that an empty mapping is a device. Times are those of a cool device;
its clock is the simulation's, which is as fast as this machine can count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pocketvlm.errors import InputError
from pocketvlm.files.yaml_document import read_yaml
from pocketvlm.json_io import DecodeError, decode

__all__ = ["Fault", "Heat", "Simulation", "StageTimes", "load_simulation"]

FaultKind = Literal[
    "disconnect", "garbage", "clock_jump", "out_of_memory", "crash", "hang", "unreachable"
]


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """An answer's stages in milliseconds; the last three are of one token."""

    preprocess_ms: float = 10.0
    vision_ms: float = 150.0
    tokenize_ms: float = 1.0
    embed_ms: float = 1.0
    prefill_ms: float = 80.0
    decode_ms: float = 20.0
    sample_ms: float = 0.2
    detokenize_ms: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Heat:
    """The device after some time of work; between two of these, everything is interpolated.

    Attributes:
        at_s: Seconds of work.
        slower: By how much every stage takes longer.
        temperature_c: Its hottest sensor.
        thermal_status: 0 (none) to 6 (shutdown), the one of the last point that was reached.
    """

    at_s: float
    slower: float = 1.0
    temperature_c: float = 30.0
    thermal_status: int = 0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong, and where.

    Attributes:
        process: The process that measures a bundle, from 0.
        kind: `disconnect`: the connection breaks. `garbage`: lines that are none of the protocol's.
            `clock_jump`: the device's clock is set. `out_of_memory` and `crash`: the system ends
            the runner. `hang`: nothing more is heard. `unreachable`: as disconnect, for good.
        after_answers: Answers of the process until then.
        jump_ms: By how much the clock is set.
        lines: The lines of `garbage`.
    """

    process: int
    kind: FaultKind
    after_answers: int = 0
    jump_ms: float = 0.0
    lines: tuple[str, ...] = ("\x00\x1b[2J{not json",)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A device.

    Attributes:
        processor: Its name in reports.
        cores: Its cores.
        ram_bytes: Its memory.
        memory_read_bytes_s: What a plain reduction reads from memory.
        last_level_cache_bytes: Its largest cache.
        runtimes: The engines that it has.
        load_ms: Time until all graphs are ready.
        stages: The stages of an answer.
        cold_slower: By how much the first answer of a process takes longer.
        text_tokens: Tokens of a prompt's text.
        visual_tokens: Tokens of a picture.
        peak_rss_bytes: The largest resident set.
        slower: By how much a bundle takes longer, by the name of its folder.
        noise: Standard deviation of every time, as a share of it.
        seed: Of the noise.
        heat: What becomes of the device as it works, in order; it does not cool.
        faults: What goes wrong.
        disk_bytes: Free space; `None` for enough.
        memory_bytes: Available memory; `None` for enough.
        transfer_bytes_s: Speed of the connection.
        transfer_ends_bytes: After how many bytes the connection breaks for good; `None` for never.
        is_reachable: Whether the device is there.
        real_time: Real seconds that a simulated one takes; 0 for none.
    """

    processor: str = "simulated"
    cores: int = 8
    ram_bytes: int = 8_000_000_000
    memory_read_bytes_s: float = 3e10
    last_level_cache_bytes: int = 4_000_000
    runtimes: tuple[str, ...] = ("onnx", "executorch")
    load_ms: float = 500.0
    stages: StageTimes = StageTimes()
    cold_slower: float = 1.5
    text_tokens: int = 32
    visual_tokens: int = 64
    peak_rss_bytes: int = 400_000_000
    slower: Mapping[str, float] = field(default_factory=dict)
    noise: float = 0.01
    seed: int = 0
    heat: tuple[Heat, ...] = (Heat(at_s=0),)
    faults: tuple[Fault, ...] = ()
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    transfer_bytes_s: float = 30e6
    transfer_ends_bytes: int | None = None
    is_reachable: bool = True
    real_time: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what no device is.

        Raises:
            ValueError: A number is out of its range, or the heat is not in order.
        """
        ranges = {
            "noise": (0 <= self.noise < 1, "at least 0 and below 1"),
            "real_time": (self.real_time >= 0, "at least 0"),
            "transfer_bytes_s": (self.transfer_bytes_s > 0, "above 0"),
            "cold_slower": (self.cold_slower > 0, "above 0"),
            "slower": (all(value > 0 for value in self.slower.values()), "above 0"),
            "heat": (
                bool(self.heat)
                and all(before.at_s < after.at_s for before, after in pairwise(self.heat))
                and all(point.slower > 0 for point in self.heat),
                "at least one point, in order of time, each `slower` above 0",
            ),
        }
        for name, (is_good, allowed) in ranges.items():
            if not is_good:
                raise ValueError(f"{name} must be {allowed}")

    def heat_at(self, at_s: float) -> Heat:
        """The device after this many seconds of work."""
        below = [point for point in self.heat if point.at_s <= at_s] or [self.heat[0]]
        above = [point for point in self.heat if point.at_s > at_s] or [self.heat[-1]]
        start, end = below[-1], above[0]
        span_s = end.at_s - start.at_s
        share = max(0.0, (at_s - start.at_s) / span_s) if span_s else 0.0
        return Heat(
            at_s=at_s,
            slower=start.slower + share * (end.slower - start.slower),
            temperature_c=start.temperature_c + share * (end.temperature_c - start.temperature_c),
            thermal_status=start.thermal_status,
        )


def load_simulation(path: Path) -> Simulation:
    """Reads a script.

    Raises:
        InputError: It cannot be read, or is not a script; the message says where and what is
            allowed.
    """
    document = read_yaml(path, "a simulated device", error=InputError)
    try:
        return decode(Simulation, document)
    except DecodeError as fault:
        raise InputError(f"{path}: {fault}") from fault
