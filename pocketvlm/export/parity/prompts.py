"""What a certificate asks: questions about pictures, the same turned round, and second turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.export.parity.metrics import Floats
from pocketvlm.export.parity.questions import Prompt, Questions
from pocketvlm.prompt.messages import Message, user_turn
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.text import TextCodec

if TYPE_CHECKING:
    from pocketvlm.calibration.data.sample import Sample

__all__ = ["read_questions", "second_turn"]

_SECOND_QUESTION = "what else?"


def second_turn(sample: Sample) -> list[Message]:
    """A sample's conversation with its answer, and one more question after it."""
    return [*sample.answered_messages(), user_turn(_SECOND_QUESTION).to_message()]


def read_questions(
    checkpoint: Checkpoint, bundle: Bundle, samples: Sequence[Sample]
) -> tuple[dict[str, float], Questions]:
    """Pixels and prompts of the checkpoint, and how far the bundle's own differ from them.

    Returns:
        The metrics `input.*`, and the questions.
    """
    processor = checkpoint.processor
    codec, preprocessor = TextCodec.from_bundle(bundle), ImagePreprocessor.from_bundle(bundle)
    pictures: list[Floats] = []
    prompts: list[Prompt] = []
    follow_ups: list[Prompt] = []
    farthest, equal = 0.0, 0
    for sample in samples:
        first = len(pictures)
        images = [sample.open_image(number) for number in range(len(sample.images))]
        grids = preprocessor.grids(images)
        for image, grid in zip(images, grids, strict=True):
            pixels: Floats = processor.pixels([image], [grid]).numpy()
            found = preprocessor.pixels(image, grid)
            same_shape = found.shape == pixels.shape
            farthest = max(farthest, float(np.abs(found - pixels).max()) if same_shape else np.inf)
            pictures += [tile[None] for tile in pixels]
        places = tuple(range(first, len(pictures)))
        messages = sample.messages()
        ids = processor.encode(messages, grids)
        equal += codec.encode(messages, grids) == ids
        prompts.append(Prompt(token_ids=tuple(ids), pictures=places, grids=tuple(grids)))
        again = processor.encode(second_turn(sample), grids)
        follow_ups.append(Prompt(token_ids=tuple(again), pictures=places, grids=tuple(grids)))
    questions = Questions(
        pictures=(*pictures, np.zeros_like(pictures[0])),
        prompts=tuple(prompts),
        follow_ups=tuple(follow_ups),
    )
    metrics = {"input.pixels_max_abs": farthest, "input.prompts_equal": equal / len(prompts)}
    return metrics, questions
