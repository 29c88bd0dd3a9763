"""The model card of a reference model, from its measured figures.

``python -m pocketvlm.reference.card MODEL --figures FILE`` writes ``README.md`` next to the
weights; the figures are what ``pocketvlm.reference.evaluate --json`` wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pocketvlm.reference import REFERENCE_MODELS, Pictures, reference_model_path
from pocketvlm.reference.questions import QUESTION_KINDS
from pocketvlm.reference.tokenizer import DIALECTS

__all__ = ["main", "write_card"]

_DESCRIPTIONS = {
    "pocket-llava": (
        "`LlavaForConditionalGeneration`: a CLIP tower with a CLS token (5 layers of 128, features "
        "of the fourth, 16-pixel patches), an MLP projector and a Llama decoder."
    ),
    "pocket-smol": (
        "`SmolVLMForConditionalGeneration`: a SigLIP-type tower without CLS (4 layers of 128, "
        "8-pixel patches), a 2x2 pixel shuffle with a linear connector and a Llama decoder."
    ),
    "pocket-tiles": (
        "`SmolVLMForConditionalGeneration`: `pocket-smol` with image splitting. Pictures of up to "
        "256x256 pixels are cut into tiles of 128x128, which the tower sees beside the whole."
    ),
}

_PICTURES: dict[Pictures, str] = {
    "reference": "The picture is 128x128 pixels and becomes 8x8 = 64 visual tokens.",
    "mosaics": "A tile is 128x128 pixels and becomes 8x8 = 64 visual tokens.",
}

_BODY = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

{description}
The decoder has 6 layers of 192, six query heads over two key-value heads of 32, tied embeddings
and a vocabulary of {vocabulary}. {pictures}

A small real vision-language model for tests, demos and compression research: it answers questions
about generated scenes (`pocketvlm.reference.scenes`) and about nothing else. Its words are a closed
list of 24, so "word" measures telling words apart rather than open reading.

## Measured

{n} held-out questions, one picture each, greedy answers, exact match, float32 arithmetic on the
shipped bfloat16 weights. "Blind" is the same model with noise in place of every picture.

{table}

    python -m pocketvlm.reference.evaluate {name} --n {n} --seed {seed}

{training}
"""


def write_card(name: str, figures: dict[str, dict[str, float]], training: str, seed: int) -> Path:
    """Writes the card of a shipped model.

    Args:
        name: The model.
        figures: ``n``, ``accuracy`` and ``blind`` of every kind and of ``all``.
        training: How it was trained, as Markdown.
        seed: Seed of the evaluation examples.

    Returns:
        Path of the card.
    """
    lines = ["| Question | n | Accuracy | Blind |", "| --- | ---: | ---: | ---: |"]
    for kind in (*QUESTION_KINDS, "all"):
        row = figures[kind]
        lines.append(f"| {kind} | {row['n']:.0f} | {row['accuracy']:.1%} | {row['blind']:.1%} |")
    text = _BODY.format(
        name=name,
        vocabulary=DIALECTS[name].vocabulary_size,
        pictures=_PICTURES[REFERENCE_MODELS[name]],
        description=_DESCRIPTIONS[name],
        n=int(figures["all"]["n"]),
        table="\n".join(lines),
        training=training.strip(),
        seed=seed,
    )
    path = reference_model_path(name) / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    """Writes one card."""
    parser = argparse.ArgumentParser(prog="pocketvlm.reference.card", description=__doc__)
    parser.add_argument("model", choices=REFERENCE_MODELS)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--training", type=Path, required=True, help="Markdown: how it was trained")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures = json.loads(options.figures.read_text(encoding="utf-8"))
    training = options.training.read_text(encoding="utf-8")
    print(write_card(options.model, figures, training, options.seed))


if __name__ == "__main__":
    main()
