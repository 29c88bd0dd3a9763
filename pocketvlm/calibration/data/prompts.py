"""Calibration conversations as token ids, and their batches."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pocketvlm.calibration.source import CalibrationSet, Sample
from pocketvlm.errors import CalibrationError, PocketVLMError
from pocketvlm.models.images.tilings import TileGrid
from pocketvlm.processor import Processor

__all__ = [
    "BATCH_TOKENS",
    "Prompt",
    "PromptBatch",
    "batch_grids",
    "batch_images",
    "batch_prompts",
    "encode_sample",
    "encode_samples",
    "tile_rows",
]

BATCH_TOKENS = 1024
"""Tokens that run through a layer at once: enough for full speed, little enough memory."""

_MAX_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One sample as token ids: prompt and answer, the image as the placeholders of its tiles.

    Attributes:
        token_ids: The ids.
        image_columns: Columns of its image's placeholders.
        grid: How its image is cut into tiles.
        is_truncated: Whether the end was cut off at the longest length that is used.
        answer_start: Column of the answer's first token.
        answer_end: Column after the token that ends the answer; equal to `answer_start` if the
            sample has no answer, or all of it was cut off.
        where: File and line that the sample came from, for messages.
    """

    token_ids: tuple[int, ...]
    image_columns: tuple[int, ...]
    grid: TileGrid
    is_truncated: bool
    answer_start: int
    answer_end: int
    where: str

    @property
    def has_answer(self) -> bool:
        """Whether there is an answer, and not all of it was cut off."""
        return self.answer_end > self.answer_start

    @property
    def tiles(self) -> int:
        """Tiles that its image is cut into."""
        return self.grid.tiles

    def sharing(self, index: int) -> Hashable:
        """What prompts of one batch have in common, of the sample of this number.

        Rows of a map that tiles make up may be left out picture by picture, so that its prompt has
        a length of its own once tokens are reduced.
        """
        return self.image_columns, self.grid, index if self.grid.is_map else None

    def predicting(self, length: int) -> slice:
        """Columns whose logits predict the answer: each token is predicted one column earlier.

        Args:
            length: Length of the sequence that enters the decoder. The image comes before the
                answer, so tokens removed from it shift the whole answer.
        """
        shift = len(self.token_ids) - length + 1
        return slice(self.answer_start - shift, self.answer_end - shift)


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Samples that run through the model together.

    Attributes:
        samples: Their indices in the calibration set.
        held_out: Whether they only evaluate the result and never enter a Hessian.
        in_tower_moments: Whether the tower's moments are taken from them too.
    """

    samples: tuple[int, ...]
    held_out: bool
    in_tower_moments: bool = True


def encode_samples(processor: Processor, samples: CalibrationSet) -> tuple[Prompt, ...]:
    """Encodes every sample.

    Raises:
        CalibrationError: A sample has no image, has the image's placeholder in its text, or its
            image does not fit into the maximal length.
    """
    return tuple(encode_sample(processor, sample) for sample in samples)


def batch_images(
    count: int, first_held_out: int, per_batch: int, *, fitted: int, judging: int
) -> tuple[PromptBatch, ...]:
    """Batches of consecutive samples; none mixes held-out samples with others.

    Args:
        count: Samples in all.
        first_held_out: The first that only evaluates.
        per_batch: Images per batch.
        fitted: How many of those before `first_held_out` enter the tower's moments.
        judging: How many of those after it do.
    """
    parts = (
        (0, min(fitted, first_held_out), False, True),
        (min(fitted, first_held_out), first_held_out, False, False),
        (first_held_out, min(first_held_out + judging, count), True, True),
        (min(first_held_out + judging, count), count, True, False),
    )
    return tuple(
        PromptBatch(
            samples=tuple(range(start, min(start + per_batch, end))),
            held_out=held_out,
            in_tower_moments=in_moments,
        )
        for begin, end, held_out, in_moments in parts
        for start in range(begin, end, per_batch)
    )


def batch_prompts(
    prompts: Sequence[Prompt], first_held_out: int, max_tokens: int
) -> tuple[PromptBatch, ...]:
    """Batches of prompts of the same length whose images are in the same columns.

    No prompt is padded: a padded column would need a mask that the phone does not have.
    """
    alike: dict[tuple[bool, int, Hashable], list[int]] = {}
    for index, prompt in enumerate(prompts):
        key = (index >= first_held_out, len(prompt.token_ids), prompt.sharing(index))
        alike.setdefault(key, []).append(index)
    batches = []
    for (held_out, length, _), indices in alike.items():
        size = max(1, max_tokens // length)
        batches += [
            PromptBatch(samples=tuple(indices[start : start + size]), held_out=held_out)
            for start in range(0, len(indices), size)
        ]
    return tuple(batches)


def batch_grids(prompts: Sequence[Prompt], samples: Sequence[int]) -> list[TileGrid]:
    """How the image of every prompt in a batch of these samples is cut."""
    return [prompts[samples[0]].grid]


def tile_rows(prompts: Sequence[Prompt], chosen: Iterable[int]) -> list[int]:
    """Rows of some prompts' tiles among the tiles of all prompts, in order."""
    ends = list(accumulate((prompt.tiles for prompt in prompts), initial=0))
    return [row for index in chosen for row in range(ends[index], ends[index + 1])]


def encode_sample(processor: Processor, sample: Sample) -> Prompt:
    """Encodes one sample.

    Raises:
        CalibrationError: As `encode_samples`.
    """
    spec = processor.spec
    if len(sample.images) != 1:
        count = f"{len(sample.images)} images" if sample.images else "no image"
        raise CalibrationError(
            f"{sample.where}: has {count}; calibration takes conversations about one image, which "
            "a vision-language model is calibrated on together with its text"
        )
    grids = sample.grids(processor)
    try:
        token_ids = processor.encode(sample.answered_messages(), grids, add_generation_prompt=False)
    except PocketVLMError as error:  # the chat template refuses the conversation
        raise CalibrationError(f"{sample.where}: {error}") from error
    columns = [at for at, token in enumerate(token_ids) if token == spec.image_token_id]
    needed = grids[0].placeholders(spec.visual_tokens)
    if len(columns) != needed:
        raise CalibrationError(
            f"{sample.where}: its prompt has {len(columns)} image placeholders, not the {needed} "
            "of one image: the chat template leaves the image out, or text becomes a placeholder"
        )
    longest = min(_MAX_TOKENS, spec.decoder.max_positions)
    if columns[-1] >= longest:
        raise CalibrationError(
            f"{sample.where}: its image ends at token {columns[-1] + 1}, beyond the {longest} that "
            "are used"
        )
    answer = _answer_columns(processor, sample, token_ids, grids)
    return Prompt(
        token_ids=tuple(token_ids[:longest]),
        image_columns=tuple(columns),
        grid=grids[0],
        is_truncated=len(token_ids) > longest,
        answer_start=min(answer.start, longest),
        answer_end=min(answer.stop, longest),
        where=sample.where,
    )


def _answer_columns(
    processor: Processor, sample: Sample, token_ids: Sequence[int], grids: Sequence[TileGrid]
) -> range:
    """Columns that the model would have had to generate, the end of the answer included."""
    question = processor.encode(sample.messages(), grids)
    # Counted along both: a tokenizer may merge the prompt's last character with the answer's first.
    start = next(
        (
            column
            for column, (asked, whole) in enumerate(zip(question, token_ids, strict=False))
            if asked != whole
        ),
        min(len(question), len(token_ids)),
    )
    if not sample.answer.strip():
        return range(start, start)
    ends = processor.eos_token_ids
    # Templates may add a line break after the end, which is never generated.
    stop = next((at + 1 for at in range(start, len(token_ids)) if token_ids[at] in ends), None)
    return range(start, len(token_ids) if stop is None else stop)
