"""Held-out accuracy and blind floor of a model: ``python -m pocketvlm.reference.evaluate MODEL``.

Answers are generated greedily through the model's own processor and chat template and compared as
they are. The blind floor is the same questions with every picture replaced by noise: the score of a
model that knows the questions and sees nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pocketvlm.processor.foreign_code import ATTENTION, STOCK_ONLY
from pocketvlm.reference import REFERENCE_MODELS, reference_model_path
from pocketvlm.reference.mosaics import GENERATORS
from pocketvlm.reference.questions import QUESTION_KINDS, Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["Score", "answer_questions", "main", "noise_image", "score_model"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Right answers by kind of question.

    Attributes:
        right: Number of right answers of every kind.
        asked: Number of questions of every kind.
    """

    right: dict[str, int]
    asked: dict[str, int]

    @property
    def n(self) -> int:
        """Number of questions."""
        return sum(self.asked.values())

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right.values()) / self.n

    def of(self, kind: str) -> float:
        """Share of right answers to one kind of question."""
        return self.right[kind] / self.asked[kind]


def noise_image(index: int, size: tuple[int, int]) -> Image.Image:
    """Uniform noise in place of picture ``index``."""
    pixels = np.random.default_rng(index).integers(
        0, 256, size=(size[1], size[0], 3), dtype=np.uint8
    )
    return Image.fromarray(pixels)


def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: list[Image.Image],
    questions: list[str],
) -> list[str]:
    """Generates the answer to one question about each image, greedily, in one batch."""
    import torch

    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs: Any = processor(
        images=[[image] for image in images], text=prompts, padding=True, return_tensors="pt"
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        generated = model.generate(**inputs, do_sample=False)
    answers = generated[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = processor.batch_decode(answers, skip_special_tokens=True)
    return texts


def score_model(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    examples: Iterator[Example],
    *,
    blind: bool = False,
    batch_size: int = 64,
) -> Score:
    """Scores generated answers by exact match.

    Args:
        model: A vision-language model in evaluation mode.
        processor: Its processor.
        examples: Questions with their expected answers.
        blind: Whether to replace every picture by noise.
        batch_size: Questions answered at a time.
    """
    right = dict.fromkeys(QUESTION_KINDS, 0)
    asked = dict.fromkeys(QUESTION_KINDS, 0)
    numbered = enumerate(examples)
    while chunk := list(islice(numbered, batch_size)):
        images = [noise_image(i, e.image.size) if blind else e.image for i, e in chunk]
        answers = answer_questions(model, processor, images, [e.question for _, e in chunk])
        for (_, example), answer in zip(chunk, answers, strict=True):
            asked[example.kind] += 1
            right[example.kind] += answer == example.answer
    return Score(right=right, asked=asked)


def main() -> None:
    """Prints accuracy and blind floor, by kind."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    parser = argparse.ArgumentParser(prog="pocketvlm.reference.evaluate", description=__doc__)
    parser.add_argument("model", help=f"{', '.join(REFERENCE_MODELS)}, or a folder")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--no-tiles", action="store_true", help="show pictures as a whole, where tiles are cut"
    )
    options = parser.parse_args()
    named = options.model in REFERENCE_MODELS
    folder = reference_model_path(options.model) if named else Path(options.model)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=ATTENTION, **STOCK_ONLY
    ).eval()
    processor = AutoProcessor.from_pretrained(folder, **STOCK_ONLY)
    if options.no_tiles:
        processor.image_processor.do_image_splitting = False
    generate = GENERATORS[REFERENCE_MODELS.get(folder.name, "reference")]
    seen, unseen = (
        score_model(
            model,
            processor,
            generate(options.seed, options.n),
            blind=blind,
            batch_size=options.batch,
        )
        for blind in (False, True)
    )
    print(f"{'kind':<10} {'n':>6} {'accuracy':>9} {'blind':>7}")
    for kind in QUESTION_KINDS:
        print(f"{kind:<10} {seen.asked[kind]:>6} {seen.of(kind):>9.1%} {unseen.of(kind):>7.1%}")
    print(f"{'all':<10} {seen.n:>6} {seen.accuracy:>9.1%} {unseen.accuracy:>7.1%}")
    if options.json:
        rows = {
            kind: {"n": seen.asked[kind], "accuracy": seen.of(kind), "blind": unseen.of(kind)}
            for kind in QUESTION_KINDS
        }
        rows["all"] = {"n": seen.n, "accuracy": seen.accuracy, "blind": unseen.accuracy}
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
