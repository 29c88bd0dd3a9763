"""Verifies a bundle without torch: on this host, or on another instruction set beside this host.

Both record what the bundle's own runtime says to the same questions, each in its own process. This
host's recording is held to itself (the picture decides, a cache continues) and to the tokens of the
certificate where that was made on the same questions; the other machine's is held to this host's,
by the metrics and bounds of the certificate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

import numpy as np

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet, Sample
from pocketvlm.context import RunContext
from pocketvlm.emulation.arm64.emulator import Emulator
from pocketvlm.errors import BundleError, InputError, UnsupportedError
from pocketvlm.export.parity.agreement import compare, judge_greedy
from pocketvlm.export.parity.artifact_side import compare_greedy
from pocketvlm.export.parity.certificate import (
    BOUNDS,
    Check,
    ParityReport,
    Precision,
    TargetParity,
    judge,
    precision_of,
)
from pocketvlm.export.parity.recording_file import MachineRecording
from pocketvlm.json_io import DecodeError, decode, encode, read_json
from pocketvlm.pipeline.assemble import PARITY_FILE
from pocketvlm.pipeline.recorders import Machine, emulated_place, host_place, record_at
from pocketvlm.runtime.engines import choose_engine

__all__ = ["Verification", "verify_bundle"]

_EMULATED = "onnx"
"""The runtime whose packages the emulated environment has."""
_NOT_RECORDED = {"prefill.sqnr_db", "prefill.argmax_mismatches"}
"""Metrics that run an artifact on another side's rows."""
_OWN = {"image_swap.reference_change", "two_turns.sqnr_db"}
"""Metrics that a recording has by itself."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a verification found.

    Attributes:
        found: The checks of the machine in question, with its instruction set.
        machines: What recorded: this host, and the machine that was compared with it.
        questions: The name of the questions.
        certified: How the tokens of that machine compare with those of the certificate that the
            bundle carries; `None` where that was made on other questions.
    """

    found: ParityReport
    machines: tuple[Machine, ...]
    questions: str
    certified: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """What was verified, in a few words: machine, processor, target."""
        machine, target = self.machines[-1], self.found.targets[0].target
        cpu = () if machine.emulator is None else (machine.emulator["cpu"],)
        return " ".join((machine.name, *cpu, target))

    def to_json(self) -> dict[str, Any]:
        """The verification as JSON values."""
        return {
            **self.found.to_json(),
            "machines": [encode(machine) for machine in self.machines],
            "questions": self.questions,
            "certified_tokens": self.certified,
            "proves": "arithmetic, never speed",
        }


@dataclass(frozen=True, kw_only=True)
class _Certified:
    """What parity.json says of the answers that it was made on."""

    questions: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]
    near_tie_margin_logit: float | None

    def __post_init__(self) -> None:
        if len(self.questions) != len(self.answers):
            raise ValueError("there must be one answer per question")


def verify_bundle(
    bundle: Bundle,
    samples: CalibrationSet,
    ctx: RunContext,
    *,
    tokens: int = 16,
    runtime: str | None = None,
    emulator: Emulator | None = None,
) -> Verification:
    """Records a bundle's answers on this host, and on an emulated machine if one is given.

    Args:
        bundle: An opened bundle.
        samples: Questions; those without a picture are left out.
        ctx: Threads and progress.
        tokens: Longest greedy answer.
        runtime: The engine; `None` for the first that the bundle has graphs for.
        emulator: The machine that is compared with this host.

    Raises:
        BundleError: It cannot be run.
        InputError: No question has a picture, or the runtime is unknown.
        UnsupportedError: The emulated environment does not have the runtime.
        CheckFailedError: A recorder ended without a recording.
    """
    target = choose_engine(bundle, runtime)
    asked = [sample for sample in samples if sample.images]
    if not asked:
        raise InputError(f"{samples.name}: no question has a picture, and a verification needs one")
    if emulator is not None and target != _EMULATED:
        raise UnsupportedError(
            f"{bundle.path}: {target} is not in the ARM64 environment, which runs {_EMULATED}"
        )
    places = [host_place(), *([] if emulator is None else [emulated_place(emulator)])]
    found = record_at(places, bundle, target, asked, tokens=tokens, ctx=ctx)
    machines, recordings = zip(*found, strict=True)
    certified = _hold_to_certificate(bundle, target, asked, recordings[-1])
    precision = precision_of(bundle.manifest.components, target)
    checks, details = _judge(recordings, precision, certified)
    said = machines[-1].facts
    parity = TargetParity(
        target=target,
        precision=precision,
        samples=len(asked),
        checks=checks,
        details={"engine": said["engine"], **details},
    )
    processor = {name: said[name] for name in ("machine", "instruction_sets")}
    return Verification(
        found=ParityReport(targets=(parity,), unverified={}, host=processor),
        machines=tuple(machines),
        questions=samples.name,
        certified=None if certified is None else certified[1],
    )


def _judge(
    recordings: Sequence[MachineRecording],
    precision: Precision,
    certified: tuple[float, dict[str, object]] | None,
) -> tuple[tuple[Check, ...], dict[str, object]]:
    """Holds the second machine to the first, or the only one to itself and the certificate."""
    found, host = recordings[-1], recordings[0]
    metrics, details = compare(found.said, host.said)
    if found is not host:
        metrics |= _compare_inputs(found, host)
        return judge(metrics, precision, wanted=BOUNDS.keys() - _NOT_RECORDED), details
    own = {name: metrics[name] for name in _OWN}
    details = {name: details[name] for name in ("image_swap_mean_total_variation",)}
    if certified is not None:
        own["greedy.mismatch_share"] = certified[0]
        details |= certified[1]
    return judge(own, precision, wanted=own.keys()), details


def _compare_inputs(found: MachineRecording, host: MachineRecording) -> dict[str, float]:
    """Pixels and prompts, as a certificate compares them."""
    farthest = 0.0
    for ours, theirs in zip_longest(found.pixels, host.pixels):
        if ours is None or theirs is None or ours.shape != theirs.shape:
            farthest = float("inf")
        else:
            farthest = max(farthest, float(np.abs(ours - theirs).max()))
    equal = [ours == theirs for ours, theirs in zip(found.prompts, host.prompts, strict=True)]
    return {
        "input.pixels_max_abs": farthest,
        "input.prompts_equal": sum(equal) / len(equal),
    }


def _hold_to_certificate(
    bundle: Bundle, target: str, asked: Sequence[Sample], recording: MachineRecording
) -> tuple[float, dict[str, object]] | None:
    """Compares tokens with those of parity.json; `None` where it was made on other questions."""
    if not bundle.has(PARITY_FILE):
        return None
    file = bundle.file(PARITY_FILE)
    block: Any = read_json(file)
    for key in ("targets", target, "details"):
        block = block.get(key) if isinstance(block, dict) else None
    if not isinstance(block, dict) or "answers" not in block:  # written by an earlier version
        return None
    named = {field.name: block.get(field.name) for field in fields(_Certified)}
    try:
        certified = decode(_Certified, named)
    except DecodeError as error:
        raise BundleError(f"{file}: targets.{target}.details: {error}") from error
    answers = dict(zip(certified.questions, certified.answers, strict=True))
    traces = []
    for sample, logits in zip(asked, recording.said.logits, strict=True):
        tokens = answers.get(sample.digest().hex(), ())[: len(logits)]
        if tokens:
            traces.append(compare_greedy(tokens, logits[: len(tokens)]))
    return judge_greedy(traces, certified.near_tie_margin_logit or 0.0) if traces else None
