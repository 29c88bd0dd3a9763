"""A measurement of bundles on a device: the `bench` block of a report, as typed values.

A run measures arms, which are (bundle, runtime) pairs; one of them is the reference that ratios are
of. Fields are the keys of the document, with units as suffixes. A field is `None`, or empty, if
nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pocketvlm.json_io import OPTIONAL, REST, WHOLE

__all__ = [
    "Energy",
    "Environment",
    "Figure",
    "Latency",
    "MeasuredArm",
    "MeasuredBundle",
    "MeasuredWorkload",
    "Measurement",
    "Memory",
    "PlausibilityCheck",
    "PredictedFigure",
    "ProcessFailure",
    "ProcessStart",
    "Prompt",
    "Retention",
    "SensorSample",
    "Sensors",
    "Stability",
    "Sustained",
]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure: its raw samples, in order, and their statistics.

    Attributes:
        samples: In the unit of the figure's name, milliseconds or tokens per second.
        median: The median of the samples.
        p90: The 90 % quantile.
        p95: The 95 % quantile.
        p99: The 99 % quantile; `None` of fewer than 100 samples, where it is their largest.
        mean: The arithmetic mean.
        sd: The standard deviation of the sample.
        by_repeat: Each process when left alone, by number of the repeat: the 10 % quantile of its
            samples, of rates the 90 % quantile; `None` for a repeat without samples.
    """

    samples: tuple[float, ...] = ()
    median: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    mean: float | None = None
    sd: float | None = None
    by_repeat: tuple[float | None, ...] = ()


_NOT_MEASURED = Figure()


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The figures of one arm.

    Attributes:
        failed: Why there are none.
        figures: By name; `docs/benchmarking.md` defines them.
    """

    failed: str | None = field(default=None, metadata=OPTIONAL)
    figures: Mapping[str, Figure] = field(default_factory=dict, metadata=REST)

    def figure(self, name: str) -> Figure:
        """The figure of this name; an empty one if it was not measured."""
        return self.figures.get(name, _NOT_MEASURED)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The prompt of a workload, in tokens of one bundle.

    Attributes:
        text_sha256: Digest of the first turn's text, which the controller adds.
    """

    text_sha256: str | None = None
    text_tokens: int | None = None
    visual_tokens: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class MeasuredWorkload:
    """The workload that was measured; `device_bench.workload.Workload` documents its shape.

    Attributes:
        image_files: Names of the pictures' files, without their folders.
        image_sha256: Digests of the encoded pictures.
        visual_tokens: Tokens per tile of the vision graph that was asked for; `None` for none.
        resolution: Width and height of what it takes, likewise.
        sampling: How tokens are chosen.
    """

    name: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    image_size: int | None = None
    pictures: int | None = None
    image_files: tuple[str, ...] = ()
    visual_tokens: int | None = None
    resolution: tuple[int, int] | None = None
    turns: int | None = None
    warm_ups: int | None = None
    answers: int | None = None
    repeats: int | None = None
    cool_down_s: float | None = None
    sustained_s: float | None = None
    ignore_eos: bool | None = None
    image_sha256: tuple[str, ...] = ()
    sampling: str | None = None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine that figures were measured on.

    Attributes:
        processor: Its name.
        machine: Its architecture.
        cores: Logical cores.
        threads: Threads of the heavy graphs.
        device: Name of the device profile.
        memory_read_bytes_s: Bytes per second that a plain reduction reads from memory.
        last_level_cache_bytes: Size of the largest cache.
        facts: The whole block as written.
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
    """The bundle of an arm, as its manifest describes it.

    Attributes:
        stored_bytes: Bytes of all its files.
        graph_bytes: Bytes of the files that this runtime loads.
        decoder_weight_bytes: Bytes of the decoder's weights, which each step reads once; `None`
            where the runtime's files do not tell.
        max_positions: Positions of a whole conversation.
        precision: How each part stores its weights, by part.
    """

    model: str | None = None
    manifest_sha256: str | None = None
    stored_bytes: int | None = None
    graph_bytes: int | None = None
    decoder_weight_bytes: int | None = None
    visual_tokens: int | None = None
    visual_tokens_full: int | None = None
    kv_dtype: str | None = None
    max_positions: int | None = None
    precision: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of processes that each held one bundle alone, by phase; never of the whole system.

    `rss` is what `counter` counts: memory that is resident. `pss` shares out pages that several
    processes map, and is known on Linux and Android alone.

    Attributes:
        counter: `VmHWM`, `phys_footprint` or `ru_maxrss`: what peaks were read from.
        peak_prefill_rss_bytes: The peak until the first token, of any answer.
        peak_decode_rss_bytes: The peak after it.
        peak_rss_bytes: The peak of the process, loading included.
        after_rss_bytes: After the last answer.
        compress_peak_rss_bytes: The largest resident set of the run that made the bundle.
    """

    counter: str | None = None
    before_load_rss_bytes: int | None = None
    after_load_rss_bytes: int | None = None
    peak_prefill_rss_bytes: int | None = None
    peak_decode_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    after_rss_bytes: int | None = None
    before_load_pss_bytes: int | None = None
    after_load_pss_bytes: int | None = None
    after_pss_bytes: int | None = None
    compress_peak_rss_bytes: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class SensorSample:
    """What the device's sensors said, `at_s` after the start of the run.

    Attributes:
        temperature_c: The hottest sensor, in degrees Celsius.
        thermal_status: 0 (none) to 6 (shutdown), as Android counts.
    """

    at_s: float | None = None
    temperature_c: float | None = None
    thermal_status: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sensors:
    """Temperature and thermal status while an arm was measured.

    Attributes:
        before_c: Degrees Celsius before the first process of the arm.
        peak_c: The highest of all samples.
        after_c: After its last process.
        status_before: Thermal status before its first process.
        status_peak: The highest.
        status_after: After its last process.
        waited_s: Seconds that the run waited for the device to cool before its processes.
        starts_warm: Processes that were started above the limit because waiting took too long.
        samples: Every reading, in order.
    """

    before_c: float | None = None
    peak_c: float | None = None
    after_c: float | None = None
    status_before: int | None = None
    status_peak: int | None = None
    status_after: int | None = None
    waited_s: float = 0.0
    starts_warm: int = 0
    samples: tuple[SensorSample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy of answers, from a counter that counts the whole system, other processes included.

    Attributes:
        counter: What counted, such as `RAPL package-0` or `battery charge`.
        scope: What the counter covers, in words; never this process alone.
        total_j: Over all counted answers.
        seconds: Their time.
        answers: How many were counted.
        new_tokens: Tokens that they generated.
        pictures: Pictures that they encoded.
        mj_per_token: Of decoding, by its tokens; of whole answers where `is_by_stage` is false.
        j_per_image: Of preparing and encoding a picture; `None` unless `is_by_stage`.
        is_by_stage: Whether the counter is fine enough to tell stages apart.
    """

    counter: str | None = None
    scope: str | None = None
    total_j: float | None = None
    seconds: float | None = None
    answers: int | None = None
    new_tokens: int | None = None
    pictures: int | None = None
    mj_per_token: float | None = None
    j_per_image: float | None = None
    is_by_stage: bool = False


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How much of a figure is left at the end of a sustained run.

    Attributes:
        samples: Of every answer, in order.
        burst: Over the answers of the first tenth of the time.
        last: Over those of the last tenth.
        retained: The share of the burst's speed that is left; 1 if nothing was lost.
    """

    samples: tuple[float, ...] = ()
    burst: float | None = None
    last: float | None = None
    retained: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sustained:
    """A sustained run: answers without a pause.

    Attributes:
        duration_s: From the beginning of the first answer to the end of the last.
        answers: How many there were.
        at_s: The end of each, from the beginning of the first.
        decode_tok_s: What became of decoding.
        ttft_user_ms: What became of the user's time to first token.
        time_to_status_s: Seconds until each thermal state above none was first seen, by its name.
    """

    duration_s: float | None = None
    answers: int | None = None
    at_s: tuple[float, ...] = ()
    decode_tok_s: Retention = field(default_factory=Retention)
    ttft_user_ms: Retention = field(default_factory=Retention)
    time_to_status_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How much the samples of an arm vary.

    Attributes:
        spread: Width of the middle 80 % of the samples as a share of their median, by figure.
        bound: The largest spread of a quiet machine.
        is_stable: Whether every spread is within the bound.
    """

    spread: Mapping[str, float] = field(default_factory=dict)
    bound: float | None = None
    is_stable: bool = False


@dataclass(frozen=True, kw_only=True)
class PlausibilityCheck:
    """Whether a figure contradicts physics or another figure, with the two numbers compared.

    Attributes:
        figures: The figures that are not published if the check fails.
        verdict: `pass`, `fail` or `not applicable`.
    """

    check: str | None = None
    figures: tuple[str, ...] = ()
    verdict: str | None = None
    value: float | None = None
    bound: float | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class ProcessStart:
    """The start of a process, in seconds from the start of the run."""

    arm: str | None = None
    at_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class ProcessFailure:
    """A process without a result, and why.

    Attributes:
        repeat: Its number, from 0.
        answers: Measured answers that had arrived by then; they count.
    """

    repeat: int | None = None
    reason: str | None = None
    answers: int = 0


@dataclass(frozen=True, kw_only=True)
class PredictedFigure:
    """One figure, predicted and measured.

    Attributes:
        name: As `docs/benchmarking.md` names it, unit included.
        predicted: What was predicted.
        measured: The median of the samples; of memory, the largest.
        ratio: Predicted divided by measured.
    """

    name: str
    predicted: float
    measured: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class MeasuredArm:
    """One (bundle, runtime) pair of a run.

    Attributes:
        runtime: The target whose graphs were run.
        prompt: The prompt in tokens of the bundle.
        latency: Figures of the first turn.
        later_turns: Figures of the turns after it.
        memory: Of its processes, the largest.
        ratios: This arm divided by the reference, median over pairs of processes, by figure; empty
            for the reference itself.
        ratio_samples: The ratio of each pair.
        plausibility: Every check of its figures.
        failures: Processes without a result.
        predicted: Predictions beside what was measured; `None` where nothing is predicted of it.
    """

    runtime: str | None = None
    bundle: MeasuredBundle = field(default_factory=MeasuredBundle)
    prompt: Prompt | None = None
    latency: Latency = field(default_factory=Latency)
    later_turns: tuple[Latency, ...] = ()
    memory: Memory = field(default_factory=Memory)
    sustained: Sustained | None = field(default=None, metadata=OPTIONAL)
    sensors: Sensors | None = field(default=None, metadata=OPTIONAL)
    energy: Energy | None = field(default=None, metadata=OPTIONAL)
    ratios: Mapping[str, float] = field(default_factory=dict)
    ratio_samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    stability: Stability | None = None
    plausibility: tuple[PlausibilityCheck, ...] = ()
    failures: tuple[ProcessFailure, ...] = ()
    predicted: tuple[PredictedFigure, ...] | None = field(default=None, metadata=OPTIONAL)

    @property
    def withheld(self) -> frozenset[str]:
        """Names of figures that failed a plausibility check, and are not to be published."""
        failed = [check for check in self.plausibility if check.verdict == "fail"]
        return frozenset(name for check in failed for name in check.figures)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One interleaved run of one workload.

    Attributes:
        reference: Name of the arm that ratios are of.
        arms: By name, the reference first.
        order: All processes in order.
        predicted_from: What predicted times are made from; why there are none, where that is so.
        notes: What a reader must know.
    """

    workload: MeasuredWorkload | None = None
    environment: Environment | None = None
    reference: str | None = None
    arms: Mapping[str, MeasuredArm] = field(default_factory=dict)
    order: tuple[ProcessStart, ...] = ()
    predicted_from: str | None = field(default=None, metadata=OPTIONAL)
    notes: tuple[str, ...] = ()

    @property
    def compared(self) -> Mapping[str, MeasuredArm]:
        """The arms beside the reference; the reference if it is alone."""
        others = {name: arm for name, arm in self.arms.items() if name != self.reference}
        return others or self.arms
