"""The report of a run as typed values: the blocks of `report.json`.

Fields are the keys of the document, with units as suffixes. A field is `None`, or empty, if a
report lacks it. What stages, targets and calibration sets write about themselves is open (`Facts`):
it is shown, and nothing is computed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pocketvlm.json_io import WHOLE, keyed
from pocketvlm.machine import REPORT_SCHEMA
from pocketvlm.reports.measurement import (
    Environment,
    Latency,
    MeasuredBundle,
    Measurement,
    Memory,
)

__all__ = [
    "Bound",
    "Check",
    "Facts",
    "Model",
    "Parity",
    "Quality",
    "Recipe",
    "Report",
    "RuntimeNeeds",
    "Score",
    "Size",
    "SourceCheck",
    "Stage",
    "TargetParity",
]

Facts = Mapping[str, Any]
"""JSON values by name, as written."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that was compressed; `facts` is the whole block."""

    name: str | None = None
    facts: Facts = field(default_factory=dict, metadata=WHOLE)


@dataclass(frozen=True, kw_only=True)
class RuntimeNeeds:
    """Requirements of one target: engine, lowest version, formats, custom operators."""

    runtime: str | None = None
    lowest_version: str | None = None
    formats: Facts = field(default_factory=dict)
    operators: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The recipe and its digest; `document` is the recipe as written."""

    name: str | None = None
    description: str | None = None
    sha256: str | None = None
    document: Facts = field(default_factory=dict, metadata=WHOLE)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage's record.

    Attributes:
        method: The stage's tag.
        parameters: Its configuration.
        version: Version of pocketvlm.
        calibration_sha256: Digest of the calibration set.
        layers: One row per layer; the columns depend on the method.
        metrics: Figures of the stage as a whole.
        notes: What a reader must know.
        seconds: Wall time.
        peak_rss_bytes: Largest resident set of the process up to the end of the stage.
    """

    method: str = "stage"
    parameters: Facts = field(default_factory=dict)
    version: str | None = None
    calibration_sha256: str | None = None
    layers: tuple[Facts, ...] = ()
    metrics: Facts = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float | None = None
    peak_rss_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes on disk.

    Attributes:
        source_bytes: Bytes of the source's weight files.
        bundle_bytes: Bytes of all files of the bundle.
        bundle_share: Bytes that an app ships for the largest target, divided by `source_bytes`.
        parts: Bytes of the bundle, by folder.
        weight_bytes: Bytes of the compressed weight matrices, by part of the model.
        source_weight_bytes: Bytes of the source's weight matrices, by part of the model.
        source_weights: Elements of these.
    """

    source_bytes: int | None = None
    bundle_bytes: int | None = None
    bundle_share: float | None = None
    parts: Mapping[str, int] = field(default_factory=dict)
    weight_bytes: Mapping[str, int] = field(default_factory=dict)
    source_weight_bytes: Mapping[str, int] = field(default_factory=dict)
    source_weights: int | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score over all questions, or over those of one kind.

    Attributes:
        metric: What counts as right.
        n: Questions.
        correct: Right answers, or the sum of credits.
        accuracy: `correct / n`.
        interval_low: Lower end of Wilson's 95 % interval.
        interval_high: Upper end.
        per_kind: The same by kind of question.
        blind: Accuracy when every picture is noise.
        credits: Credit of each question, in order.
    """

    metric: str | None = None
    n: int | None = None
    correct: float | None = None
    accuracy: float | None = None
    interval_low: float | None = None
    interval_high: float | None = None
    per_kind: Mapping[str, Score] = field(default_factory=dict)
    blind: float | None = None
    credits: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Scores of the original checkpoint and of the bundle.

    Attributes:
        uncompressed: The score of the checkpoint in float; `float` in the document.
        compressed: The score of the bundle.
        recovery: The bundle's accuracy as a share of the checkpoint's.
        blind: Accuracy of the checkpoint when every picture is noise.
    """

    metric: str | None = None
    n: int | None = None
    uncompressed: Score = field(default_factory=Score, metadata=keyed("float"))
    compressed: Score = field(default_factory=Score)
    recovery: float | None = None
    blind: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The bounds of a metric; `None` if it cannot fail in that direction."""

    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One metric, its bound and the verdict.

    Attributes:
        sample: The conversation, in a source check.
        value: The measured value; `None` if it was not finite.
        difference: What differs, in a source check that failed.
    """

    sample: str | None = None
    metric: str | None = None
    value: float | None = None
    bound: Bound = field(default_factory=Bound)
    passed: bool = False
    difference: str | None = None


@dataclass(frozen=True, kw_only=True)
class TargetParity:
    """The certificate of one target.

    Attributes:
        precision: The arithmetic that the bounds are for.
        samples: Questions that were compared.
        details: Further figures that explain the metrics.
    """

    target: str | None = None
    precision: str | None = None
    passed: bool = False
    samples: int | None = None
    checks: tuple[Check, ...] = ()
    details: Facts = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The certificates by target, why other targets have none, and the host."""

    passed: bool = False
    targets: Mapping[str, TargetParity] = field(default_factory=dict)
    unverified: Mapping[str, str] = field(default_factory=dict)
    host: Facts = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SourceCheck:
    """The comparison of the checkpoint with stock transformers.

    Attributes:
        verdict: `passed`, `failed`, `not verified` or `skipped`.
        reason: Why there is no verdict.
        stock: Version and classes of transformers.
    """

    verdict: str | None = None
    reason: str | None = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    stock: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run, or measurements alone.

    Attributes:
        command: The command line.
        bundle: The bundle that was made; its digest joins this report with measurements of it.
        runtimes: Requirements by target.
        calibration: A description of the calibration set.
        environment: The machine of the run.
        latency: Of the run's bundle, by target; empty where nothing but `bench` is known.
        bench: The measurement that `latency` and `memory` come from; empty if nothing was timed.
        grid: The measurements of further workloads, on the same arms.
        notes: What a reader must know.
        failures: Checks and bounds that were not met.
        document: The JSON object that it was read from.
    """

    schema: int = REPORT_SCHEMA
    command: str | None = None
    model: Model = field(default_factory=Model)
    bundle: MeasuredBundle | None = None
    runtimes: Mapping[str, RuntimeNeeds] = field(default_factory=dict)
    recipe: Recipe | None = None
    calibration: Facts = field(default_factory=dict)
    environment: Environment = field(default_factory=Environment)
    stages: tuple[Stage, ...] = ()
    size: Size = field(default_factory=Size)
    quality: Quality | None = None
    source_check: SourceCheck | None = None
    parity: Parity | None = None
    latency: Mapping[str, Latency] = field(default_factory=dict)
    bench: Measurement = field(default_factory=Measurement)
    grid: tuple[Measurement, ...] = ()
    memory: Memory = field(default_factory=Memory)
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    document: Facts = field(default_factory=dict, metadata=WHOLE)
