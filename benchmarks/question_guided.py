"""Which visual tokens to keep once the question is known, beside selections that do not know it.

    python benchmarks/question_guided.py reference:pocket-llava --keep 0.25 0.11 0.05

CDPruner (arXiv 2506.10967) ranks tokens by their likeness to the question, in the space of the
decoder's embeddings where the tower has no text encoder beside it, and chooses by determinants.
Here that is done in torch between tower and decoder: likeness alone, with determinants, with the
opposite sign (as for LLaVA), by the nearest word of the question, and together with distinctness.
Beside it are shipped reducers, and FastV, whose ranking knows the question as well and whose first
layers run all tokens. An answer is right where greedy generation would write all of it.
Prints a table with paired differences against `determinantal`, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.prompts import (
    Prompt,
    PromptBatch,
    batch_prompts,
    encode_samples,
)
from pocketvlm.calibration.gradients.backward import enter_decoder
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.baseline.uniform_stride import UniformStride
from pocketvlm.compress.tokens.diverse.determinantal import (
    Determinantal,
    likeliest_tokens,
    scaled,
)
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.compress.tokens.schedule.fast_v import FastV
from pocketvlm.evaluation.intervals import compare_paired
from pocketvlm.graph.selection import cosine_similarity, gather_tokens, top_indices
from pocketvlm.graph.token_scores import distinctness
from pocketvlm.pipeline.sources import resolve_model
from pocketvlm.reference_graph.forward import (
    VisualTokens,
    decode_logits,
    embed_text,
    encode_images,
)

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""Indices [B, k], ascending, from tokens [B, N, width], the question's words [B, T, width], k."""


def by_likeness(rows: Tensor, words: Tensor, keep: int) -> Tensor:
    """The tokens that are most like the question, by the mean over its words."""
    return top_indices(cosine_similarity(rows, words).mean(dim=-1), keep)


def determinants(relevance: Callable[[Tensor], Tensor], *, is_distinct: bool = False) -> Choose:
    """CDPruner's selection.

    Args:
        relevance: What a token counts, from its likeness to each word, [B, N, T].
        is_distinct: Whether it counts too how unlike it is to the picture's mean.
    """

    def choose(rows: Tensor, words: Tensor, keep: int) -> Tensor:
        counts = scaled(relevance(cosine_similarity(rows, words)))
        if is_distinct:
            counts = counts * scaled(distinctness(rows))
        return likeliest_tokens(rows, counts, keep).sort(dim=-1).values

    return choose


GUIDED: dict[str, Choose] = {
    "likeness to the question": by_likeness,
    "determinants, likeness": determinants(lambda likeness: likeness.mean(dim=-1)),
    "determinants, unlikeness": determinants(lambda likeness: -likeness.mean(dim=-1)),
    "determinants, nearest word": determinants(lambda likeness: likeness.amax(dim=-1)),
    "distinct, and likeness": determinants(
        lambda likeness: likeness.mean(dim=-1), is_distinct=True
    ),
    "distinct, and unlikeness": determinants(
        lambda likeness: -likeness.mean(dim=-1), is_distinct=True
    ),
}
UNGUIDED: dict[str, Reducer] = {"determinantal": Determinantal(), "uniform_stride": UniformStride()}
BASELINE = "determinantal"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one length, with their pictures and questions."""

    samples: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    pixels: Tensor
    words: Tensor


def batches(checkpoint: Checkpoint, samples: CalibrationSet) -> Iterator[Batch]:
    """Samples that run together: prompts and questions of equal lengths."""
    processor = checkpoint.processor
    prompts = encode_samples(processor, samples)
    asked = [
        processor.tokenizer.encode(sample.turns[-1].text, add_special_tokens=False)
        for sample in samples
    ]
    for together in batch_prompts(prompts, len(prompts), 2048):
        for length in sorted({len(asked[index]) for index in together.samples}):
            own = tuple(index for index in together.samples if len(asked[index]) == length)
            yield Batch(
                samples=own,
                prompts=tuple(prompts[index] for index in own),
                pixels=samples.pixels(processor, own),
                words=embed_text(checkpoint, torch.tensor([asked[index] for index in own])),
            )


def right(checkpoint: Checkpoint, batch: Batch, visual: VisualTokens) -> list[float]:
    """1 for each sample of a batch whose answer is right, else 0."""
    alone = PromptBatch(samples=tuple(range(len(batch.samples))), held_out=False)
    inputs, _ = enter_decoder(checkpoint, batch.prompts, alone, visual)
    logits = decode_logits(checkpoint, inputs)
    found = []
    for prompt, own in zip(batch.prompts, logits, strict=True):
        answer = torch.tensor(prompt.token_ids[prompt.answer_start : prompt.answer_end])
        said = own[prompt.predicting(len(own))].argmax(dim=-1)
        found.append(float((said == answer).all()))
    return found


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Credits of every question, by what was kept."""
    checkpoint = Checkpoint.load(resolve_model(options.model))
    spec = checkpoint.spec
    samples = CalibrationSet.from_reference(options.seed + 1, options.n, split="evaluation")
    earned: dict[str, list[float]] = {}

    def add(name: str, batch: Batch, found: list[float]) -> None:
        own = earned.setdefault(name, [0.0] * len(samples))
        for index, credit in zip(batch.samples, found, strict=True):
            own[index] = credit

    for batch in batches(checkpoint, samples):
        visual = encode_images(checkpoint, batch.pixels)
        add("all tokens", batch, right(checkpoint, batch, visual))
        for share in options.keep:
            keep = max(1, round(share * spec.visual_tokens))
            for name, choose in GUIDED.items():
                indices = choose(visual.embeds, batch.words, keep)
                kept = VisualTokens(embeds=gather_tokens(visual.embeds, indices), indices=indices)
                add(f"{share:g} {name}", batch, right(checkpoint, batch, kept))
            for name, reducer in UNGUIDED.items():
                module = reducer.build(spec, keep=keep, positions="original").eval()
                reduced = replace(checkpoint, reducer=module)
                seen = encode_images(reduced, batch.pixels)
                add(f"{share:g} {name}", batch, right(reduced, batch, seen))
            for layers in (1, 2):
                schedule = FastV(first_layers=layers, keep=keep).plan(
                    spec.decoder.depth, spec.visual_tokens
                )
                dropping = replace(checkpoint, visual_schedule=schedule)
                found = right(dropping, batch, visual)
                add(f"{share:g} fast_v after {layers}", batch, found)
    return earned


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a reference model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.11, 0.05])
    parser.add_argument("--n", type=int, default=500, help="held-out questions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    earned = measure(options)
    rows = []
    for name, own in earned.items():
        share = name.partition(" ")[0]
        beside = earned.get(f"{share} {BASELINE}", earned["all tokens"])
        pair = compare_paired(beside, own)
        rows.append({"kept": name, "accuracy": sum(own) / options.n, "difference": asdict(pair)})
        change, low, high = (
            100 * value for value in (pair.difference, pair.interval_low, pair.interval_high)
        )
        accuracy = sum(own) / options.n
        print(f"{name:<36}{accuracy:>7.1%}  {change:+6.1f} [{low:+.1f}, {high:+.1f}]")
    print(json.dumps({"benchmark": "question_guided", "model": options.model, "rows": rows}))


if __name__ == "__main__":
    main()
