"""Preflight: finds before any compute what the runtime would refuse in the end.

The processor's files are written as in a bundle, and opened with the runtime's own readers: what
passes here is what an app will read. No weights are needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pocketvlm.bundle import Bundle, sign_bundle
from pocketvlm.calibration.data.prompts import encode_sample
from pocketvlm.calibration.data.sample import Sample
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.errors import CalibrationError, PocketVLMError, UnsupportedError, join_problems
from pocketvlm.evaluation.prompts import PromptLimits, Question, answer_problem
from pocketvlm.evaluation.score import MAX_NEW_TOKENS
from pocketvlm.export.parity.prompts import second_turn
from pocketvlm.models.images.tilings import ONE_TILE
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.assemble import write_processor
from pocketvlm.processor import Processor
from pocketvlm.prompt.messages import Turn, chat_messages, user_turn
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.text import TextCodec
from pocketvlm.stages import Target

__all__ = ["Findings", "Readers", "certificate_samples", "check_data", "check_model"]

_CERTIFIED = 8
_CERTIFIED_TOKENS = 16
_SIZES = ((64, 48), (33, 90))


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of checks.

    Attributes:
        problems: What would be refused, one line each.
        notes: What is allowed, but should be known.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def joined(self, other: Findings) -> Findings:
        """The results of two checks together."""
        return Findings(
            problems=(*self.problems, *other.problems), notes=(*self.notes, *other.notes)
        )

    def raise_if_any(self, error: type[PocketVLMError]) -> None:
        """Raises the problems as one line.

        Raises:
            PocketVLMError: `error`, if there are any.
        """
        if self.problems:
            raise error(join_problems(self.problems))


@dataclass(frozen=True, kw_only=True, eq=False)
class Readers:
    """The runtime's own readers of one model.

    Attributes:
        processor: The checkpoint's processor, with which they must agree.
        codec: Messages to token ids.
        preprocessor: Pictures to pixels.
    """

    processor: Processor
    codec: TextCodec
    preprocessor: ImagePreprocessor

    @classmethod
    def open(cls, model: Path, spec: ModelSpec) -> Readers:
        """Opens them on the files that a bundle would have.

        Args:
            model: The checkpoint directory.
            spec: Its specification.

        Raises:
            CheckpointError: The processor's files are missing or damaged.
            UnsupportedError: The runtime cannot read them.
        """
        processor = Processor.load(model, spec)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                manifest = write_processor(processor, processor.spec, folder)
                bundle = Bundle(path=folder, manifest=sign_bundle(folder, manifest))
                return cls(
                    processor=processor,
                    codec=TextCodec.from_bundle(bundle),
                    preprocessor=ImagePreprocessor.from_bundle(bundle),
                )
            except PocketVLMError as error:
                # The bundle would be made from the model's own files: name those.
                raise UnsupportedError(str(error).replace(str(folder), str(model))) from error
            except ValueError as error:
                raise UnsupportedError(f"{model}: {error}") from error

    def limits(self, rows: int | None = None, kept: int | None = None) -> PromptLimits:
        """The limits that prompts must fit into, before and after compression.

        Args:
            rows: Rows of KV cache.
            kept: Rows of one picture after reduction.
        """
        spec = self.processor.spec
        return PromptLimits(
            image_token_id=spec.image_token_id,
            placeholders=spec.visual_tokens,
            kept=spec.visual_tokens if kept is None else kept,
            keeps_positions=True,  # the float model is evaluated too
            vocabulary=spec.decoder.vocab_size,
            positions=spec.decoder.context_length,
            rows=rows,
        )


def check_model(readers: Readers, path: Path) -> Findings:
    """Checks that the runtime's readers of a model agree with the checkpoint's about pictures.

    Args:
        readers: The readers.
        path: The checkpoint directory, for messages.
    """
    problems = [*_picture_problems(readers, path), *_prompt_problems(readers, path)]
    return Findings(problems=tuple(problems), notes=tuple(_token_notes(readers)))


def check_data(
    readers: Readers,
    targets: Sequence[Target],
    *,
    kept: int,
    calibration: CalibrationSet | None,
    evaluation: CalibrationSet | None,
) -> Findings:
    """Checks every row of the data as it will be used: pictures, prompt, length.

    Args:
        readers: The runtime's readers.
        targets: The targets that will answer.
        kept: Rows of one picture after reduction.
        calibration: The calibration set of the stages.
        evaluation: The questions to score.
    """
    problems: list[str] = []
    notes: list[str] = []
    if calibration is not None:
        cut = 0
        for sample in calibration:
            problem, is_cut = _calibration_problem(readers, sample)
            problems += [] if problem is None else [problem]
            cut += is_cut
        notes += calibration.notes
        if cut:
            notes.append(
                f"{calibration.name}: {cut} of {len(calibration)} conversations are longer than "
                "what calibration uses, and are cut"
            )
    if evaluation is not None:
        limits = readers.limits(_rows(targets, readers.processor.spec), kept)
        found = (_question_problem(readers, limits, sample) for sample in evaluation)
        problems += [problem for problem in found if problem is not None]
        notes += [note for note in evaluation.notes if note not in notes]
    return Findings(problems=tuple(problems), notes=tuple(notes))


def certificate_samples(
    readers: Readers,
    targets: Sequence[Target],
    *,
    kept: int,
    calibration: CalibrationSet,
    evaluation: CalibrationSet | None,
) -> tuple[tuple[Sample, ...], Findings]:
    """The questions about pictures for the certificate.

    These are the first rows with a picture that leave room for a second turn: of the questions,
    else of the calibration set, else synthetic ones, with a note that says so.

    Args:
        readers: The runtime's readers.
        targets: The targets that will answer.
        kept: Rows of one picture after reduction.
        calibration: The calibration set of the stages.
        evaluation: The questions to score.
    """
    limits = readers.limits(_rows(targets, readers.processor.spec), kept)

    def fits(sample: Sample) -> bool:
        grids, problem = _attempt(sample.grids, readers.preprocessor)
        if problem:
            return False
        for messages in (sample.messages(), second_turn(sample)):
            prompt, problem = _attempt(readers.codec.encode, messages, grids)
            if problem:
                return False
            question = Question(token_ids=prompt, grids=grids)
            if limits.problem(question, _CERTIFIED_TOKENS):
                return False
        return bool(sample.images)

    for data in (evaluation, calibration):
        chosen = tuple(islice(filter(fits, data or ()), _CERTIFIED))
        if chosen:
            return chosen, Findings()
    note = (
        "the certificate is made on synthetic questions: no row of the data has a picture and "
        "leaves room for a second turn"
    )
    return CalibrationSet.synthetic(_CERTIFIED).samples, Findings(notes=(note,))


def _rows(targets: Sequence[Target], spec: ModelSpec) -> int:
    """Cache rows that every target has."""
    return min((target.capacity(spec) for target in targets), default=spec.decoder.context_length)


def _picture_problems(readers: Readers, path: Path) -> list[str]:
    """Checks that the runtime makes the same pixels as the checkpoint's processor."""
    processor, tower = readers.processor, readers.processor.spec.tower
    for size in _SIZES:
        values = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), np.uint8)
        image = Image.fromarray(values)
        own = readers.preprocessor.pixels(image)
        tiles = readers.preprocessor.grid(image).tiles
        wanted = (tiles, tower.channels, tower.height, tower.width)
        if own.shape != wanted:
            return [
                f"{path}: the image processor makes pictures of {own.shape[-1]} x "
                f"{own.shape[-2]}, and the tower takes {tower.width} x {tower.height}"
            ]
        stock, problem = _attempt(processor.pixels, [image])
        if problem is not None:
            return [f"{path}: the image processor cannot be run: {problem}"]
        if tuple(stock.shape) != wanted or not np.array_equal(stock.numpy(), own):
            return [
                f"{path}: the runtime would make other pixels than this image processor; a setting "
                "of it is not supported"
            ]
    return []


def _prompt_problems(readers: Readers, path: Path) -> list[str]:
    """Checks the prompts of a question about a picture and of a second question."""
    answered = Turn(role="assistant", parts=("red",))
    asked = [user_turn("what is it?", 1)]
    conversations = (asked, [*asked, answered, user_turn("and what else?")])
    prompts = []
    for turns in conversations:
        messages = chat_messages(turns)
        prompt, problem = _attempt(readers.codec.encode, messages)
        if problem is None:
            question = Question(token_ids=prompt, grids=[ONE_TILE])
            problem = readers.limits().problem(question, 1)
        if problem is not None:
            return [f"{path}: a question about a picture cannot be asked: {problem}"]
        stock, problem = _attempt(readers.processor.encode, messages)
        if problem is not None or stock != prompt:
            reason = problem or "its prompt is not that of the runtime"
            return [f"{path}: a question about a picture cannot be asked of the model: {reason}"]
        prompts.append(prompt)
    other = readers.codec.encode(chat_messages([user_turn("where was it taken?", 1)]))
    if other == prompts[0]:
        return [f"{path}: the chat template leaves out what the user asks"]
    return []


def _token_notes(readers: Readers) -> list[str]:
    """Notes about the tokens."""
    table = readers.processor.spec.decoder.vocab_size
    vocabulary = readers.codec.tokenizer.get_vocab()
    beyond = sorted(token for token, number in vocabulary.items() if number >= table)
    notes = []
    if beyond:
        notes.append(
            f"{len(beyond)} tokens of the tokenizer, such as {beyond[0]!r}, have no row in the "
            f"model's table of {table:,}: a text with one of them is refused"
        )
    if not any(0 <= token < table for token in readers.codec.eos_token_ids):
        notes.append("no token ends an answer: every answer has the maximal length")
    return notes


def _calibration_problem(readers: Readers, sample: Sample) -> tuple[str | None, bool]:
    """Why stages cannot look at a row, or whether it is cut."""
    try:
        grids = sample.grids(readers.preprocessor)
    except CalibrationError as error:
        return str(error), False
    _, problem = _attempt(
        readers.codec.encode, sample.answered_messages(), grids, add_generation_prompt=False
    )
    if problem is not None:
        return f"{sample.where}: {problem}", False
    try:
        prompt = encode_sample(readers.processor, sample)
        sample.open_image()
    except CalibrationError as error:
        return str(error), False
    table = readers.processor.spec.decoder.vocab_size
    unknown = next((token for token in prompt.token_ids if token >= table), None)
    if unknown is not None:
        problem = f"token {unknown} is beyond the model's table of {table:,} rows"
        return f"{sample.where}: {problem}", False
    return None, prompt.is_truncated


def _question_problem(readers: Readers, limits: PromptLimits, sample: Sample) -> str | None:
    """Why a row cannot be scored."""
    try:
        grids = sample.grids(readers.preprocessor)
    except CalibrationError as error:
        return str(error)
    prompt, problem = _attempt(readers.codec.encode, sample.messages(), grids)
    if problem is None:
        question = Question(token_ids=prompt, grids=grids)
        problem = limits.problem(question, MAX_NEW_TOKENS)
    problem = problem or answer_problem(sample)
    if problem is not None:
        return f"{sample.where}: {problem}"
    try:
        for number in range(len(sample.images)):
            sample.open_image(number)
    except CalibrationError as error:
        return str(error)
    return None


def _attempt(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, str | None]:
    """The result of a reader, or the first line of its error."""
    try:
        return call(*arguments, **options), None
    except Exception as error:  # noqa: BLE001  (a stranger's template or processor raises anything)
        return None, str(error).strip().partition("\n")[0] or type(error).__name__
