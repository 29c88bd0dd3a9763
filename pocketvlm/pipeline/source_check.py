"""Source check: compares the checkpoint as this package reads it with the stock classes.

The parity certificate compares a bundle with this package's own torch side; an error that both
share passes it. Here that torch side is compared with transformers' model and processor, loaded
from the same folder by the library alone, before any stage: pixels (the runtime's too), prompt,
number of placeholders, logits after the prompt and a greedy answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from pocketvlm.checkpoint import Checkpoint, ModelFolder, read_model_folder
from pocketvlm.errors import InputError, SourceMismatchError
from pocketvlm.export.parity.certificate import Bound
from pocketvlm.export.parity.metrics import relative_error
from pocketvlm.json_io import decode
from pocketvlm.machine import available_memory_bytes, toolchain_versions
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.pipeline.stock import StockAnswer, StockModel, StockUnavailable
from pocketvlm.prompt.messages import PICTURE, Turn, chat_messages, user_turn
from pocketvlm.reference.questions import generate_examples
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    decode_logits,
    embed_prompts,
    encode_images,
    greedy_generate,
    new_cache,
)
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.weights.modules import cache_dense_weights

__all__ = [
    "BOUNDS",
    "SourceCheck",
    "SourceCheckMode",
    "SourceReport",
    "Verdict",
    "check_source",
    "verify_folder",
]

SourceCheckMode = Literal["require", "allow", "skip"]

Verdict = Literal["passed", "failed", "not verified", "skipped"]

BOUNDS: Mapping[str, Bound] = {
    "pixels_max_abs": Bound(at_most=0.0),
    "runtime_pixels_max_abs": Bound(at_most=0.0),
    "prompt_ids_equal": Bound(at_least=1.0),
    "placeholders_differ": Bound(at_most=0.0),
    "prefill_relative_error": Bound(at_most=1e-3),
    "tokens_equal": Bound(at_least=1.0),
}
"""The bound of each metric."""

_NEW_TOKENS = 16
_TIE = 1e-4  # between scores this close, relative to the largest, rounding decides


@dataclass(frozen=True, kw_only=True)
class SourceCheck:
    """One metric on one sample.

    Attributes:
        sample: The conversation.
        metric: A name in `BOUNDS`.
        value: The measured value; `None` if it is not finite.
        bound: The most that is allowed.
        passed: Whether it is within the bound.
        difference: What differs, if anything.
    """

    sample: str
    metric: str
    value: float | None
    bound: Bound
    passed: bool
    difference: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """The result of a source check.

    Attributes:
        verdict: `passed`, `failed`, or why there is neither: the stock classes could not be loaded,
            or the check was not requested.
        reason: Why it is not verified.
        checks: Every metric on every sample.
        notes: How the stock side differs from the library's own choice.
        stock: Classes and version of the stock side.
        seconds: How long it took.
    """

    verdict: Verdict
    reason: str | None = None
    checks: tuple[SourceCheck, ...] = ()
    notes: tuple[str, ...] = ()
    stock: Mapping[str, str] | None = None
    seconds: float = 0.0

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SourceReport:
        """The report that `to_json` wrote.

        Raises:
            DecodeError: It is not such a report.
        """
        return decode(cls, document, "source_check")

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def line(self) -> str:
        """The verdict with its reason, or with the first difference."""
        if self.verdict == "failed":
            first = next(check for check in self.checks if not check.passed)
            return f"failed: {first.metric} of {first.sample}: {first.difference or first.value}"
        return self.verdict if self.reason is None else f"{self.verdict}: {self.reason}"

    def lines(self) -> list[str]:
        """The report for people."""
        return [
            f"source check   {self.line()}",
            *(f"  {check.sample}: {check.metric} {check.value}" for check in self.checks),
            *(f"note           {note}" for note in self.notes),
        ]

    def run_notes(self) -> list[str]:
        """Notes for the report of a run."""
        notes = [f"source check: {note}" for note in self.notes]
        if self.verdict != "passed":
            notes.insert(0, f"source check: {self.line()}")
        return notes

    def raise_if_failed(self) -> None:
        """Raises the first difference.

        Raises:
            SourceMismatchError: The checkpoint is read differently than by the stock classes.
        """
        if self.verdict == "failed":
            raise SourceMismatchError(
                "the checkpoint as it is read here is not what stock transformers makes of it: "
                f"{self.line().removeprefix('failed: ')}; --allow-source-mismatch continues"
            )


@dataclass(frozen=True, kw_only=True)
class _Sample:
    name: str
    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]


@dataclass(frozen=True, kw_only=True)
class _Stock:
    """What the stock classes answered: their names, and an answer to each sample."""

    answers: tuple[StockAnswer, ...]
    model: str
    processor: str
    notes: tuple[str, ...]


def check_source(checkpoint: Checkpoint, folder: ModelFolder) -> SourceReport:
    """Compares a checkpoint, before any stage, with the stock classes.

    A second model is loaded in float32, and freed before the checkpoint is asked.

    Args:
        checkpoint: The checkpoint as it was loaded from the folder.
        folder: The folder.

    Raises:
        PocketVLMError: This package refuses a sample.
    """
    started = time.perf_counter()
    if checkpoint.processor.empty_tiles is not None:  # stock knows no empty tiles
        checkpoint = replace(checkpoint, processor=checkpoint.processor.with_empty_contrast(None))
    samples, prompts, unasked = _ask_template(checkpoint)
    try:
        stock = _ask_stock(folder, samples)
    except StockUnavailable as reason:
        return SourceReport(verdict="not verified", reason=str(reason))
    asked = zip(samples, prompts, stock.answers, strict=True)
    checks = [check for question in asked for check in _compare(checkpoint, *question)]
    return SourceReport(
        verdict="passed" if all(check.passed for check in checks) else "failed",
        checks=tuple(checks),
        notes=(*stock.notes, *unasked),
        stock={
            "transformers": str(toolchain_versions(["transformers"])["transformers"]),
            "model": stock.model,
            "processor": stock.processor,
        },
        seconds=round(time.perf_counter() - started, 3),
    )


def verify_folder(path: Path) -> SourceReport:
    """Loads a checkpoint and compares it with the stock classes; `check_source` alone.

    Raises:
        PocketVLMError: The checkpoint cannot be loaded.
    """
    return check_source(load_checkpoint(path), read_model_folder(path))


def _ask_stock(folder: ModelFolder, samples: Sequence[_Sample]) -> _Stock:
    """Loads the stock model, asks it everything, and frees it.

    Raises:
        StockUnavailable: The library cannot load it or answer.
    """
    stock = StockModel.load(folder)
    return _Stock(
        answers=tuple(
            stock.answer(sample.turns, sample.images, max_new_tokens=_NEW_TOKENS)
            for sample in samples
        ),
        model=type(stock.model).__name__,
        processor=type(stock.processor).__name__,
        notes=stock.notes,
    )


def _ask_template(
    checkpoint: Checkpoint,
) -> tuple[tuple[_Sample, ...], list[list[int]], tuple[str, ...]]:
    """The samples and their prompts, and a note if the chat template cannot render one.

    Our renderer comes first: it refuses a template that hangs, which then never reaches stock.
    """
    processor, samples = checkpoint.processor, _samples()
    prompts, notes = [], []
    for number, sample in enumerate(samples):
        messages = chat_messages(sample.turns)
        try:
            prompts.append(processor.encode(messages, processor.grids(sample.images)))
        except InputError as error:
            if number == 0:
                raise
            # Some templates take a single question; then its picture is used in one turn.
            samples = (samples[0], replace(sample, name="wide picture", turns=samples[0].turns))
            messages = chat_messages(samples[1].turns)
            prompts.append(processor.encode(messages, processor.grids(sample.images)))
            notes.append(f"one turn alone is compared: {error}")
    return samples, prompts, tuple(notes)


def _samples() -> tuple[_Sample, _Sample]:
    """One question about a square picture, and one in a second turn about a wide one."""
    first, second = generate_examples(11, 2, split="evaluation")
    wide = second.image.convert("RGB").resize((301, 170))
    return (
        _Sample(name="one turn", turns=(user_turn(first.question, 1),), images=(first.image,)),
        _Sample(
            name="two turns",
            turns=(
                Turn(role="user", parts=(PICTURE, second.question)),
                Turn(role="assistant", parts=(second.answer,)),
                Turn(role="user", parts=(first.question,)),
            ),
            images=(wide,),
        ),
    )


def _compare(
    checkpoint: Checkpoint, sample: _Sample, prompt: list[int], stock: StockAnswer
) -> list[SourceCheck]:
    processor, spec = checkpoint.processor, checkpoint.spec
    checks: list[SourceCheck] = []

    def hold(metric: str, value: float, difference: str | None = None) -> None:
        passed = BOUNDS[metric].holds(value)
        checks.append(
            SourceCheck(
                sample=sample.name,
                metric=metric,
                value=float(value) if np.isfinite(value) else None,
                bound=BOUNDS[metric],
                passed=passed,
                difference=None if passed else difference,
            )
        )

    grids = processor.grids(sample.images)
    pixels = processor.pixels(sample.images, grids)
    preprocessor = ImagePreprocessor.from_settings(processor.image_processor.settings)
    runtime = np.concatenate(
        [preprocessor.pixels(*cut) for cut in zip(sample.images, grids, strict=True)]
    )
    for metric, found in (
        ("pixels_max_abs", pixels.numpy()),
        ("runtime_pixels_max_abs", runtime),
    ):
        if found.shape != stock.pixels.shape:
            hold(metric, np.inf, f"stock makes {stock.pixels.shape}, here {found.shape}")
        else:
            distance = float(np.abs(found - stock.pixels).max())
            hold(metric, distance, f"pixels differ by up to {distance:.3g}")
    hold(
        "prompt_ids_equal",
        float(prompt == stock.token_ids),
        _first_difference(prompt, stock.token_ids, processor.tokenizer),
    )
    ours, theirs = (ids.count(spec.image_token_id) for ids in (prompt, stock.token_ids))
    hold("placeholders_differ", abs(ours - theirs), f"stock has {theirs}, here {ours}")
    spare = available_memory_bytes() // 2
    with torch.inference_mode(), cache_dense_weights(checkpoint.model, budget=spare):
        visual = encode_images(checkpoint, pixels)
        inputs = embed_prompts(checkpoint, torch.tensor([prompt]), visual, grids)
        logits = decode_logits(checkpoint, inputs, new_cache(checkpoint), last_only=False)[0]
        generated = _generate(checkpoint, inputs)
    # Prompts with different tokens can only be compared by their last logits.
    rows = slice(None) if prompt == stock.token_ids else slice(-1, None)
    error = relative_error(logits[rows].numpy(), stock.logits[rows])
    hold("prefill_relative_error", error, f"logits after the prompt differ by {error:.3g}")
    hold("tokens_equal", *_compare_tokens(generated, stock, processor))
    return checks


def _generate(checkpoint: Checkpoint, inputs: DecoderInputs) -> list[int]:
    return greedy_generate(
        checkpoint,
        inputs,
        max_new_tokens=_NEW_TOKENS,
        eos_token_ids=checkpoint.processor.eos_token_ids,
    )[0]


def _compare_tokens(ours: list[int], stock: StockAnswer, processor: Any) -> tuple[float, str]:
    """Whether two answers are the same, up to a choice that rounding decides."""
    theirs = stock.generated
    end = next((i for i, token in enumerate(theirs) if token in processor.eos_token_ids), None)
    theirs = theirs[:end]
    if ours == theirs:
        return 1.0, ""
    position = next(
        (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None
    )
    if position is not None:
        scores = stock.scores[position]
        finite = np.abs(scores[np.isfinite(scores)]).max(initial=0.0)
        if abs(scores[ours[position]] - scores[theirs[position]]) <= _TIE * finite:
            return 1.0, ""
    return 0.0, _first_difference(ours, theirs, processor.tokenizer)


def _first_difference(ours: Sequence[int], theirs: Sequence[int], tokenizer: Any) -> str:
    def shown(ids: Sequence[int], position: int) -> str:
        if position >= len(ids):
            return "nothing"
        return f"{ids[position]} ({tokenizer.convert_ids_to_tokens(ids[position])!r})"

    position = next(
        (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
        min(len(ours), len(theirs)),
    )
    return (
        f"token {position} of {len(theirs)} is {shown(theirs, position)} in stock, "
        f"{shown(ours, position)} here"
    )
