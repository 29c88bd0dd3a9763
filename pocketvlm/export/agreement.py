"""Runs an artifact beside the checkpoint that it was made from, and measures where they part.

Both sides are `Runner`s, so the same measurements hold for every engine. The reference lays its
prompts out through `forward.embed_prompts`, the artifact through `runtime.splice`: what differs
between the two is found as well as what differs inside a graph. Nothing is judged here;
`parity.py` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pocketvlm.bundle import Manifest
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.export.closeness import Floats, cosine, relative_error
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.forward import VisualTokens, embed_prompts
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.splice import VisualFeatures, embed_rows, lay_out_prompt

__all__ = [
    "GreedyTrace",
    "Prompt",
    "Rows",
    "Side",
    "VisionAgreement",
    "artifact_side",
    "compare_greedy",
    "compare_vision",
    "in_turns",
    "reference_side",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One question as both sides take it.

    Attributes:
        token_ids: The prompt, its image as all N placeholders.
        pixels: float32 [1, C, S, S].
    """

    token_ids: tuple[int, ...]
    pixels: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """A prompt after the splice.

    Attributes:
        embeds: float32 [1, rows, width].
        positions: int64 [1, rows].
        next_position: Rotary position of the first generated token.
    """

    embeds: Floats
    positions: npt.NDArray[np.int64]
    next_position: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """A runner, and how prompts are laid out for it."""

    runner: Runner
    lay_out: Callable[[Prompt], Rows]

    def answer(self, rows: Rows) -> Floats:
        """Logits [vocabulary] behind rows that stand alone."""
        self.runner.reset()
        return self.runner.decode(rows.embeds, rows.positions).copy()

    def step(self, token: int, position: int) -> Floats:
        """Logits [vocabulary] behind one more token."""
        place = np.array([[position]], np.int64)
        return self.runner.decode(self.runner.embed([token]), place).copy()


def reference_side(checkpoint: Checkpoint) -> Side:
    """The checkpoint in torch, laid out by `forward.embed_prompts`."""
    runner = TorchRunner(checkpoint)

    def lay_out(prompt: Prompt) -> Rows:
        embeds, indices = runner.encode_image(prompt.pixels)
        with torch.inference_mode():
            inputs = embed_prompts(
                checkpoint,
                torch.tensor([prompt.token_ids]),
                VisualTokens(embeds=torch.from_numpy(embeds), indices=torch.from_numpy(indices)),
            )
        return Rows(
            embeds=inputs.embeds.numpy(),
            positions=inputs.positions.numpy(),
            next_position=int(inputs.next_position[0]),
        )

    return Side(runner=runner, lay_out=lay_out)


def artifact_side(runner: Runner, manifest: Manifest) -> Side:
    """An engine, laid out by what the bundle's manifest says."""

    def lay_out(prompt: Prompt) -> Rows:
        embeds, indices = runner.encode_image(prompt.pixels)
        pictures = [VisualFeatures(embeds=embeds, indices=indices)]
        layout = lay_out_prompt(
            prompt.token_ids,
            pictures,
            image_token_id=int(manifest.prompt["image_token_id"]),
            placeholders=manifest.visual_tokens_full,
            keeps_positions=manifest.positions == "original",
        )
        return Rows(
            embeds=embed_rows(layout, pictures, runner.embed),
            positions=layout.positions[None],
            next_position=layout.next_position,
        )

    return Side(runner=runner, lay_out=lay_out)


@dataclass(frozen=True, kw_only=True)
class VisionAgreement:
    """Features of one picture on both sides.

    Attributes:
        overlap: Share of the reference's tokens that the artifact kept too.
        relative_error: Of the features that both kept.
        cosine: Of the worst of these.
    """

    overlap: float
    relative_error: float
    cosine: float


def compare_vision(reference: Side, artifact: Side, pixels: Floats) -> VisionAgreement:
    """Runs the vision graph on both sides."""
    expected, kept = reference.runner.encode_image(pixels)
    found, chosen = artifact.runner.encode_image(pixels)
    _, ours, theirs = np.intersect1d(kept[0], chosen[0], return_indices=True)
    if not len(ours):
        return VisionAgreement(overlap=0.0, relative_error=float("inf"), cosine=0.0)
    shared, twins = expected[0, ours], found[0, theirs]
    return VisionAgreement(
        overlap=len(ours) / max(kept.shape[1], chosen.shape[1]),
        relative_error=relative_error(twins, shared),
        cosine=min(cosine(a, b) for a, b in zip(twins, shared, strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class GreedyTrace:
    """Two greedy answers to one prompt, compared up to where they part.

    Attributes:
        compared: Tokens that both chose behind the same tokens, the end of the answer included.
        expected: The reference's tokens.
        found: The artifact's tokens up to the first that differs.
        margin: Where they part, how much more the reference gave to its own choice than to the
            artifact's, in logits; `None` where they do not part.
    """

    compared: int
    expected: tuple[int, ...]
    found: tuple[int, ...]
    margin: float | None

    @property
    def equal(self) -> int:
        """Tokens that are the same."""
        return self.compared - (self.margin is not None)


def compare_greedy(
    reference: Side, artifact: Side, prompt: Prompt, *, tokens: int, eos_token_ids: Sequence[int]
) -> GreedyTrace:
    """Lets both sides answer, each from its own features and its own cache.

    Behind the first token that differs the two have different questions to answer, so nothing
    more is compared.
    """
    ours, theirs = reference.lay_out(prompt), artifact.lay_out(prompt)
    logits, candidate = reference.answer(ours), artifact.answer(theirs)
    expected: list[int] = []
    found: list[int] = []
    for step in range(tokens):
        expected.append(int(logits.argmax()))
        found.append(int(candidate.argmax()))
        if expected[-1] != found[-1]:
            margin = float(logits[expected[-1]] - logits[found[-1]])
            return GreedyTrace(
                compared=step + 1, expected=tuple(expected), found=tuple(found), margin=margin
            )
        if expected[-1] in eos_token_ids or step == tokens - 1:
            break
        logits = reference.step(expected[-1], ours.next_position + step)
        candidate = artifact.step(found[-1], theirs.next_position + step)
    return GreedyTrace(
        compared=len(expected), expected=tuple(expected), found=tuple(found), margin=None
    )


def in_turns(side: Side, rows: Rows, first: int) -> Floats:
    """Logits behind rows that arrive as a conversation does.

    The first turn's prompt is one run, its answer comes token by token, and the second turn is
    one run on the cache that these left. Two rows of answer are enough to change the path.

    Args:
        side: Who runs.
        rows: Both turns.
        first: Rows of the first turn's prompt.
    """
    side.runner.reset()
    for start, end in ((0, first), (first, first + 1), (first + 1, first + 2)):
        side.runner.decode(rows.embeds[:, start:end], rows.positions[:, start:end])
    last = slice(first + 2, None)
    return side.runner.decode(rows.embeds[:, last], rows.positions[:, last]).copy()
