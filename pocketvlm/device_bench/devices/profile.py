"""What is known of a device without a measurement, each figure with the source it is from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Cluster", "Device", "Fact", "Names", "PublishedFigure", "RuntimeOnDevice"]

_MANY_CORES = 64
_MOST_HZ = 1e10
_INT8_MACS = {"i8mm": 32, "dotprod": 16}
_PLAIN_INT8_MACS = 8  # SMULL and SADALP on 16 pairs, two instructions
_FLOAT_MACS = 4


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A figure and where it is from, or why there is none.

    Attributes:
        value: The figure; `None` where no source gives one.
        source: The key of its source.
        note: What a reader should know; for a missing figure, where it was looked for.
    """

    value: float | None
    source: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        if self.value is None and not self.note:
            raise ValueError("value is null; a note must say where it was looked for")
        if self.value is not None and not self.source:
            raise ValueError("a value needs a source; without one it is null")
        if self.value is not None and self.value <= 0:
            raise ValueError(f"value is {self.value:g}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names with their source.

    Attributes:
        values: The names.
        source: The key of their source; `None` where nothing is known.
    """

    values: tuple[str, ...] = ()
    source: str | None = None

    def __post_init__(self) -> None:
        if self.values and not self.source:
            raise ValueError("values need a source; without one the list is empty")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Cores of one kind.

    Attributes:
        core: Its name.
        count: How many.
        max_hz: Their highest clock; `None` where no source gives it.
        role: Whether a runtime's threads should run on them.
        source: The key of the source of the three.
        simd_units: 128-bit units of a core that multiply and add vectors.
    """

    core: str
    count: int
    max_hz: float | None
    role: Literal["performance", "efficiency"]
    source: str
    simd_units: Fact

    def __post_init__(self) -> None:
        if not 0 < self.count <= _MANY_CORES:
            raise ValueError(f"count is {self.count}; allowed are 1 to {_MANY_CORES}")
        if self.max_hz is not None and not 0 < self.max_hz <= _MOST_HZ:
            raise ValueError(f"max_hz is {self.max_hz:g}; allowed are hertz up to {_MOST_HZ:g}")


@dataclass(frozen=True, kw_only=True)
class RuntimeOnDevice:
    """A runtime whose maker says that it runs there.

    Attributes:
        name: The target that it runs.
        source: The key of the source.
    """

    name: Literal["onnx", "executorch", "coreml"]
    source: str


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """A figure published by others; not measured here.

    Attributes:
        model: The model.
        runtime: The runtime and its precision.
        metric: Its name, unit included, such as `decode_tok_s`.
        value: Its value.
        source: Where it was published.
        unit: The processor that ran it; `None` if the source does not say.
        shape: A shape whose decoder has the same sizes, to predict the figure by; `None` for none.
        kernel: What its weights are multiplied with, as `Rates.products` names it.
    """

    model: str
    runtime: str
    metric: str
    value: float
    source: str
    unit: Literal["cpu", "gpu", "npu"] | None = None
    shape: str | None = None
    kernel: str | None = None


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        name: Its name on the command line.
        description: One line about it.
        sources: What the keys of sources stand for.
        transport: How it is measured where the profile alone says so.
        ram_bytes: Physical memory of the named variant.
        memory_bandwidth_bytes_s: What its memory could deliver at most.
        clusters: Its cores.
        instruction_sets: Those that decide which kernels a runtime chooses.
        runtimes: What runs there.
        app_memory_bytes: What one app may use.
        notes: What a reader must know.
        published: Figures of others, for orientation.
    """

    name: str
    description: str
    sources: Mapping[str, str] = field(default_factory=dict)
    transport: Literal["host"] | None = None
    ram_bytes: Fact
    memory_bandwidth_bytes_s: Fact
    clusters: tuple[Cluster, ...] = ()
    instruction_sets: Names = Names()
    runtimes: tuple[RuntimeOnDevice, ...] = ()
    app_memory_bytes: Fact
    notes: tuple[str, ...] = ()
    published: tuple[PublishedFigure, ...] = ()

    def __post_init__(self) -> None:
        for place, source in self._cited():
            if source not in self.sources:
                known = ", ".join(self.sources) or "none"
                raise ValueError(f"{place}: source {source!r} is not among sources ({known})")

    @property
    def performance_cores(self) -> int:
        """Cores that a runtime's threads should run on."""
        return sum(one.count for one in self.clusters if one.role == "performance")

    @property
    def fastest_hz(self) -> float | None:
        """The highest clock of any core."""
        return max((one.max_hz for one in self.clusters if one.max_hz is not None), default=None)

    @property
    def float_macs_s(self) -> float | None:
        """Float32 multiplications and additions that the performance cores could do a second.

        `None` where units or clock of a core are not known. A 128-bit unit does four a cycle.
        """
        return self._vector_cycles_s(_FLOAT_MACS)

    @property
    def int8_macs_s(self) -> float | None:
        """The same of int8 with int32 sums: 16 a unit and cycle with dotprod, 32 with i8mm."""
        known = (_INT8_MACS[name] for name in _INT8_MACS if name in self.instruction_sets.values)
        return self._vector_cycles_s(next(known, _PLAIN_INT8_MACS))

    def lines(self) -> list[str]:
        """The profile for people, each figure with its source or with why there is none."""
        shown = [f"{self.name:<14} {self.description}"]
        for name, fact, unit in (
            ("memory", self.ram_bytes, "GB"),
            ("bandwidth", self.memory_bandwidth_bytes_s, "GB/s"),
            ("an app may use", self.app_memory_bytes, "GB"),
        ):
            shown.append(f"{name:<14} {self._stated(fact, unit)}")
        for cluster in self.clusters:
            clock = "clock unknown" if cluster.max_hz is None else f"{cluster.max_hz / 1e9:.2f} GHz"
            shown.append(
                f"cores          {cluster.count} x {cluster.core}, {clock}, {cluster.role}  "
                f"[{self.sources[cluster.source]}]"
            )
        sets = self.instruction_sets
        if sets.source is not None:
            shown.append(f"instructions   {', '.join(sets.values)}  [{self.sources[sets.source]}]")
        shown += [
            f"runtime        {one.name}  [{self.sources[one.source]}]" for one in self.runtimes
        ]
        shown += [f"note           {note}" for note in self.notes]
        shown += [
            f"published      {one.metric} {one.value:g}: {one.model}, {one.runtime}"
            f"{'' if one.unit is None else f', {one.unit}'}  [{one.source}]"
            for one in self.published
        ]
        return shown

    def _stated(self, fact: Fact, unit: str) -> str:
        if fact.value is None:
            return f"unknown: {fact.note}"
        note = "" if fact.note is None else f"; {fact.note}"
        return f"{fact.value / 1e9:g} {unit}  [{self.sources[fact.source or '']}{note}]"

    def _vector_cycles_s(self, macs: int) -> float | None:
        total = 0.0
        for cluster in self.clusters:
            if cluster.role != "performance":
                continue
            units, hz = cluster.simd_units.value, cluster.max_hz
            if units is None or hz is None:
                return None
            total += cluster.count * hz * units * macs
        return total or None

    def _cited(self) -> Iterator[tuple[str, str]]:
        facts = {
            "ram_bytes": self.ram_bytes,
            "memory_bandwidth_bytes_s": self.memory_bandwidth_bytes_s,
            "app_memory_bytes": self.app_memory_bytes,
        }
        for index, cluster in enumerate(self.clusters):
            yield f"clusters.{index}", cluster.source
            facts[f"clusters.{index}.simd_units"] = cluster.simd_units
        for place, fact in facts.items():
            if fact.source is not None:
                yield place, fact.source
        if self.instruction_sets.source is not None:
            yield "instruction_sets", self.instruction_sets.source
        for index, runtime in enumerate(self.runtimes):
            yield f"runtimes.{index}", runtime.source
