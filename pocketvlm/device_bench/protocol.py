"""The line protocol between the controller and a runner on a device.

```text
stdin   one JSON document, the job (or the file that `--job FILE` names)
stdout  lines; one that is a JSON object with the key "event" is an event, any other is for people;
        the last line is one JSON document, the result
stderr  messages of the libraries
exit    0 with a result, 2 with a reason
```

One process does one job and ends, so that its peak memory is that of one bundle alone, its first
answer is cold, and it cannot affect the next measurement. Nothing here depends on where the device
is or in which language its runner is written. Events are sent as things happen, so that what was
measured is not lost with a device that vanishes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from pocketvlm.device_bench.block import AnswerTimes, SensorSample
from pocketvlm.json_io import DecodeError, decode, encode
from pocketvlm.runtime.vision import ANY_VISION, VisionChoice

__all__ = [
    "ANSWER_MARK",
    "PROTOCOL",
    "AnswerEvent",
    "AnswerKind",
    "BlockJob",
    "EnvironmentJob",
    "Event",
    "Failure",
    "Job",
    "LoadedEvent",
    "Result",
    "SensorsEvent",
    "SensorsJob",
    "Turn",
    "parse_event",
    "parse_job",
    "parse_result",
    "write_event",
    "write_failure",
    "write_job",
    "write_result",
]

PROTOCOL = 3
"""The version of jobs, events and results."""

ANSWER_MARK = "\U000f0002"
"""Stands in a rendered turn for the answer to an earlier one; a private-use character."""

AnswerKind = Literal["cold", "warm_up", "measured", "sustained"]
Result = dict[str, Any]
"""The `result` of a job, as JSON values: an environment, a `SensorSample`, or a `Block`."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of the conversation that is measured.

    Attributes:
        text: What the user writes.
        pictures: Which of the job's pictures the user shows with it.
        rendered: The chat template's text of this turn and all before it, up to where the answer
            begins, one mark per picture (`PromptCodec.render`); for runners that have no Jinja.
            Answers of earlier turns are not in it: each is `ANSWER_MARK`, for which a runner
            inserts its own.
    """

    text: str
    pictures: tuple[int, ...] = ()
    rendered: str | None = None


@dataclass(frozen=True, kw_only=True)
class BlockJob:
    """Measure one bundle.

    Attributes:
        bundle: Its folder on the device.
        runtime: The target whose graphs are run.
        turns: The conversation; every answer starts it from an empty cache.
        new_tokens: Tokens per answer, the first one included.
        pictures: Encoded files, as base64, so that every bundle reads the same bytes.
        vision: The vision graph that sees them, where a bundle has several.
        ignore_eos: Whether generation continues after an end token.
        warm_ups: Answers before the measured ones; the first of them is the cold one.
        answers: Measured answers.
        sustained_s: Seconds of further answers without a pause; `None` for none.
        threads: Threads of the heavy graphs; `None` for one per physical core.
    """

    bundle: str
    runtime: str
    turns: tuple[Turn, ...]
    new_tokens: int
    pictures: tuple[str, ...] = ()
    vision: VisionChoice = ANY_VISION
    ignore_eos: bool = True
    warm_ups: int = 1
    answers: int = 1
    sustained_s: float | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class EnvironmentJob:
    """Describe the device, as threads of this number will find it."""

    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class SensorsJob:
    """Read the sensors once; a controller that waits for a device to cool asks this often."""


Job = BlockJob | EnvironmentJob | SensorsJob
_JOBS: dict[str, type[BlockJob | EnvironmentJob | SensorsJob]] = {
    "environment": EnvironmentJob,
    "sensors": SensorsJob,
    "block": BlockJob,
}


@dataclass(frozen=True, kw_only=True)
class LoadedEvent:
    """All graphs are ready."""

    load_ms: float


@dataclass(frozen=True, kw_only=True)
class AnswerEvent:
    """An answer is complete, `at_ms` after the runner's start."""

    kind: AnswerKind
    turn: int
    at_ms: float
    times: AnswerTimes


SensorsEvent = SensorSample
"""A sample of the sensors."""

Event = LoadedEvent | AnswerEvent | SensorsEvent
_EVENTS: dict[str, type[LoadedEvent | AnswerEvent | SensorsEvent]] = {
    "loaded": LoadedEvent,
    "answer": AnswerEvent,
    "sensors": SensorsEvent,
}
_EVENT_NAMES = {kind: name for name, kind in _EVENTS.items()}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a job returned no result, and what had arrived by then."""

    reason: str
    events: tuple[Event, ...] = field(default=())


def write_job(job: Job) -> str:
    """The job as one line."""
    name = next(name for name, kind in _JOBS.items() if isinstance(job, kind))
    return json.dumps({"schema": PROTOCOL, "job": name, **encode(job)}, allow_nan=False)


def parse_job(text: str) -> Job:
    """Reads what `write_job` wrote.

    Raises:
        ValueError: The job is unknown, not valid, or of another protocol.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or document.get("schema") != PROTOCOL:
        schema = document.get("schema") if isinstance(document, dict) else None
        raise ValueError(f"job schema {schema!r}; this runner speaks {PROTOCOL}")
    name = document.get("job")
    if name not in _JOBS:
        raise ValueError(f"job {name!r}; this runner knows {', '.join(_JOBS)}")
    content = {key: value for key, value in document.items() if key not in ("schema", "job")}
    return decode(_JOBS[name], content, "job")


def write_event(event: Event) -> str:
    """The event as one line."""
    return json.dumps({"event": _EVENT_NAMES[type(event)], **encode(event)}, allow_nan=False)


def parse_event(line: str) -> Event | None:
    """The event that a line holds; `None` for a line for people, and for an unknown event."""
    if not line.startswith("{"):
        return None
    try:
        document = json.loads(line)
        kind = _EVENTS[document.pop("event")]
        return decode(kind, document, "event")
    except (ValueError, KeyError, TypeError, RecursionError, DecodeError):
        return None


def write_result(result: Result) -> str:
    """The last line of a job that was done."""
    document = {"schema": PROTOCOL, "status": "ok", "result": result}
    return json.dumps(document, allow_nan=False)


def write_failure(reason: str) -> str:
    """The last line of a job that could not be done."""
    return json.dumps({"schema": PROTOCOL, "status": "failed", "reason": reason})


def parse_result(line: str) -> Result | Failure | None:
    """What the last line of a runner says; `None` if it is not a JSON document."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("schema") != PROTOCOL:
        return Failure(reason="the last line of the runner is not a result of this protocol")
    if document.get("status") == "failed":
        return Failure(reason=str(document.get("reason")))
    result = document.get("result")
    return result if isinstance(result, dict) else None
