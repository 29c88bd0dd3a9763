"""What was measured of a bundle on a device: the `bench` block of a report, as typed values.

Fields are the keys of the document, units are suffixes of their names. A field is `None`, or empty,
where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pocketvlm.json_io import OPTIONAL, REST, WHOLE

__all__ = [
    "Environment",
    "Figure",
    "Latency",
    "MeasuredBundle",
    "MeasuredWorkload",
    "Measurement",
    "Memory",
    "PlausibilityCheck",
    "ProcessFailure",
    "ProcessStart",
    "Prompt",
    "Stability",
]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure: its raw samples, in the order in which they were taken, and their statistics.

    Attributes:
        samples: Milliseconds or tokens per second, as the figure's name says.
        median: Of the samples, as is each of the following.
        p90: The 90 % quantile.
        mean: The arithmetic mean.
        sd: The standard deviation of the sample.
    """

    samples: tuple[float, ...] = ()
    median: float | None = None
    p90: float | None = None
    mean: float | None = None
    sd: float | None = None


_NOT_MEASURED = Figure()


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The figures of one bundle on one target.

    Attributes:
        failed: Why there are none.
        figures: By name; `docs/benchmarking.md` defines them.
    """

    failed: str | None = field(default=None, metadata=OPTIONAL)
    figures: Mapping[str, Figure] = field(default_factory=dict, metadata=REST)

    def figure(self, name: str) -> Figure:
        """The figure of this name; an empty one where it was not measured."""
        return self.figures.get(name, _NOT_MEASURED)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The prompt of a workload as one bundle counts it, in tokens."""

    text_sha256: str | None = None
    text_tokens: int | None = None
    visual_tokens: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class MeasuredWorkload:
    """The shape that was measured; `device_bench.workload.Workload` says what the fields mean.

    Attributes:
        image_file: Name of the picture's file, without its folder.
        image_sha256: Digest of the encoded picture.
        prompt: As the candidate counted it.
        sampling: How tokens are chosen.
    """

    name: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    image_size: int | None = None
    image_file: str | None = None
    warm_ups: int | None = None
    answers: int | None = None
    repeats: int | None = None
    cool_down_s: float | None = None
    ignore_eos: bool | None = None
    image_sha256: str | None = None
    prompt: Prompt | None = None
    sampling: str | None = None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What figures were measured on.

    Attributes:
        processor: Its name.
        machine: Its architecture.
        cores: Logical cores.
        threads: Threads of the heavy graphs.
        device: Name of the device profile.
        memory_read_bytes_s: Bytes per second that a plain reduction reads from memory.
        last_level_cache_bytes: Size of the largest cache.
        facts: The whole block, for people.
    """

    processor: str | None = None
    machine: str | None = None
    cores: int | None = None
    threads: int | None = None
    device: str | None = None
    memory_read_bytes_s: float | None = None
    last_level_cache_bytes: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, metadata=WHOLE)


@dataclass(frozen=True, kw_only=True)
class MeasuredBundle:
    """One bundle of the comparison, as its manifest describes it.

    Attributes:
        stored_bytes: Bytes of all its files.
        decoder_weight_bytes: Bytes of the decoder's weights, which each step reads once.
        precision: How each part stores its weights, by part.
    """

    model: str | None = None
    manifest_sha256: str | None = None
    stored_bytes: int | None = None
    decoder_weight_bytes: int | None = None
    visual_tokens: int | None = None
    visual_tokens_full: int | None = None
    kv_dtype: str | None = None
    precision: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident sets of processes that each held one bundle alone; the worst of them.

    Attributes:
        baseline: The same of the baseline.
        compress_peak_rss_bytes: The largest resident set of the run that made the bundle.
    """

    before_load_rss_bytes: int | None = None
    after_load_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    baseline: Memory | None = field(default=None, metadata=OPTIONAL)
    compress_peak_rss_bytes: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How much the reference of the run scattered.

    Attributes:
        of: `baseline` or `candidate`.
        spread: Width of the middle 80 % of the samples as a share of their median, by figure.
        bound: The largest spread of a quiet machine.
        is_stable: Whether every spread is within the bound.
    """

    of: str | None = None
    spread: Mapping[str, float] = field(default_factory=dict)
    bound: float | None = None
    is_stable: bool = False


@dataclass(frozen=True, kw_only=True)
class PlausibilityCheck:
    """Whether a figure contradicts physics or another figure, with the two numbers compared.

    Attributes:
        role: The bundle.
        verdict: `pass`, `fail` or `not applicable`.
    """

    role: str = ""
    check: str | None = None
    verdict: str | None = None
    value: float | None = None
    bound: float | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class ProcessStart:
    """When the process of one bundle was started, in seconds from the beginning of the run."""

    role: str | None = None
    at_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class ProcessFailure:
    """A process that gave no result, and why; repeats count from 0."""

    role: str | None = None
    repeat: int | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One interleaved run of the bench.

    Attributes:
        bundles: By role, `candidate` and `baseline`.
        latency: Of the candidate, by target.
        baseline: Of the baseline, by target; `None` where there was none.
        ratios: Candidate divided by baseline, median over pairs of processes, by figure.
        ratio_samples: The ratio of each pair.
        memory: Of the candidate, with the baseline's in it.
        plausibility: Every check of every bundle.
        order: The processes in the order in which they ran.
        failures: Processes that gave no result.
        notes: What a reader must know.
    """

    workload: MeasuredWorkload | None = None
    environment: Environment | None = None
    bundles: Mapping[str, MeasuredBundle] = field(default_factory=dict)
    latency: Mapping[str, Latency] = field(default_factory=dict)
    baseline: Mapping[str, Latency] | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    ratio_samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    stability: Stability | None = None
    plausibility: tuple[PlausibilityCheck, ...] = ()
    order: tuple[ProcessStart, ...] = ()
    failures: tuple[ProcessFailure, ...] = ()
    notes: tuple[str, ...] = ()
