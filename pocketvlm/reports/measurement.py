"""The measurement of a bundle on a device: the `bench` block of a report, as typed values.

Fields are the keys of the document, with units as suffixes. A field is `None`, or empty, if nothing
was measured.
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
    "MeasuredBundle",
    "MeasuredWorkload",
    "Measurement",
    "Memory",
    "PlausibilityCheck",
    "ProcessFailure",
    "ProcessStart",
    "Prompt",
    "Retention",
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
        """The figure of this name; an empty one if it was not measured."""
        return self.figures.get(name, _NOT_MEASURED)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The prompt of a workload, in tokens of one bundle."""

    text_sha256: str | None = None
    text_tokens: int | None = None
    visual_tokens: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class MeasuredWorkload:
    """The workload that was measured; `device_bench.workload.Workload` documents its shape.

    Attributes:
        image_file: Name of the picture's file, without its folder.
        image_sha256: Digest of the encoded picture.
        prompt: The prompt in tokens of the candidate.
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
    """One bundle of a comparison, as its manifest describes it.

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
    """Memory of processes that each held one bundle alone, by phase; never of the whole system.

    `rss` is what `counter` counts: memory that is resident. `pss` shares out pages that several
    processes map, and is known on Linux and Android alone.

    Attributes:
        counter: `VmHWM`, `phys_footprint` or `ru_maxrss`: what peaks were read from.
        peak_prefill_rss_bytes: The peak until the first token, of any answer.
        peak_decode_rss_bytes: The peak after it.
        peak_rss_bytes: The peak of the process, loading included.
        after_rss_bytes: After the last answer.
        baseline: The same for the baseline.
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
    baseline: Memory | None = field(default=None, metadata=OPTIONAL)
    compress_peak_rss_bytes: int | None = field(default=None, metadata=OPTIONAL)


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
        burst: Over the answers of the first tenth of the time.
        last: Over those of the last tenth.
        retained: The share of the burst's speed that is left; 1 if nothing was lost.
    """

    burst: float | None = None
    last: float | None = None
    retained: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sustained:
    """A sustained run: answers without a pause.

    Attributes:
        duration_s: From the beginning of the first answer to the end of the last.
        answers: How many there were.
        decode_tok_s: What became of decoding.
        ttft_user_ms: What became of the user's time to first token.
        time_to_status_s: Seconds until each thermal state above none was first seen, by its name.
    """

    duration_s: float | None = None
    answers: int | None = None
    decode_tok_s: Retention = field(default_factory=Retention)
    ttft_user_ms: Retention = field(default_factory=Retention)
    time_to_status_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How much samples of the reference vary.

    Attributes:
        of: The reference: `baseline` if there is one, else `candidate`.
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
    """The start of a process, in seconds from the start of the run."""

    role: str | None = None
    at_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class ProcessFailure:
    """A process without a result, and why; repeats count from 0."""

    role: str | None = None
    repeat: int | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One interleaved run of the benchmark.

    Attributes:
        bundles: By role, `candidate` and `baseline`.
        latency: Figures of the candidate, by target.
        baseline: Figures of the baseline, by target; `None` without a baseline.
        ratios: Candidate divided by baseline, median over pairs of processes, by figure.
        ratio_samples: The ratio of each pair.
        memory: Resident sets of the candidate, and of the baseline.
        plausibility: Every check of every bundle.
        order: All processes in order.
        failures: Processes without a result.
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
