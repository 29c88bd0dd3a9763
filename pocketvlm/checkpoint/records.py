"""Records: what was done to a checkpoint, and where its weights came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Source", "StageRecord", "timeless"]


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What one stage did to a checkpoint; enough to replay it and to render the report.

    Attributes:
        method: The stage's tag.
        parameters: Its configuration, as JSON values.
        version: Version of pocketvlm.
        calibration_sha256: Digest of the calibration set, or `None` if none was used.
        layers: One row per layer: name, form, bits, losses, fallbacks with reasons.
        metrics: Figures of the stage as a whole.
        notes: What a reader must know: fallbacks, skipped modules, failed bounds.
        seconds: Wall time; written to the run's log and report, not to a saved checkpoint.
        peak_rss_bytes: Peak resident set of the process at the end of the stage; likewise.
    """

    method: str
    parameters: Mapping[str, Any]
    version: str
    calibration_sha256: str | None
    layers: tuple[Mapping[str, Any], ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_rss_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint came from.

    Attributes:
        name: Folder name of the original model.
        sha256: Digest of its weight files.
        weight_bytes: Bytes of its weight files.
        notes: What is ignored in its directory, or differs from what its own files say.
    """

    name: str
    sha256: str
    weight_bytes: int
    notes: tuple[str, ...] = ()


def timeless(record: StageRecord) -> dict[str, Any]:
    """A record without timings, so that the same work ends in the same bytes."""
    document = asdict(record)
    for key in ("seconds", "peak_rss_bytes"):
        del document[key]
    document["layers"] = [
        {key: value for key, value in layer.items() if key != "seconds"}
        for layer in document["layers"]
    ]
    return document
