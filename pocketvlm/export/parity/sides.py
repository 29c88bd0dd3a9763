"""Two sides of a comparison: what a checkpoint says, and what an artifact made from it says.

The checkpoint lays its prompts out through `forward.embed_prompts`, the artifact through
`runtime.splice`: what differs between the two is found as well as what differs inside a graph.
Nothing is judged here; `parity.py` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt
import torch

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.export.parity.metrics import Floats, cosine, relative_error
from pocketvlm.models.images.tilings.tile_grid import TileGrid
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    VisualTokens,
    decode_logits,
    embed_prompts,
    embed_text,
    encode_images,
    split_rows,
)
from pocketvlm.runtime.generate import Rows, StopRules, generate, prompt_rows
from pocketvlm.runtime.picture_rows import PictureRows
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.splice import VisualFeatures, lay_out_prompt

__all__ = [
    "ArtifactSide",
    "CheckpointSide",
    "Features",
    "GreedyTrace",
    "Prompt",
    "Rows",
    "VisionAgreement",
    "compare_features",
    "compare_greedy",
]

_TOGETHER = 4
"""Pictures that the checkpoint encodes at the same time."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question as both sides take it.

    Attributes:
        token_ids: The prompt, each picture as all its placeholders.
        pictures: Numbers of its pictures' tiles, in the order of their places.
        grids: How its pictures are cut.
    """

    token_ids: tuple[int, ...]
    pictures: tuple[int, ...]
    grids: tuple[TileGrid, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What a vision graph returned: embeds float32 [1, k, width] and indices int64 [1, k]."""

    embeds: Floats
    indices: npt.NDArray[np.int64]


class CheckpointSide:
    """The checkpoint in torch.

    Every forward pass unpacks every weight once, so prompts run together, padded on the right,
    and no dense copy of the model is kept: a certificate needs little more memory than the
    checkpoint itself.
    """

    def __init__(self, checkpoint: Checkpoint, pictures: Sequence[Floats]) -> None:
        self._checkpoint = checkpoint
        self.features: list[Features] = []
        with torch.inference_mode():
            for start in range(0, len(pictures), _TOGETHER):
                pixels = torch.from_numpy(np.concatenate(pictures[start : start + _TOGETHER]))
                visual = encode_images(checkpoint, pixels)
                self.features += [
                    Features(embeds=embeds[None].numpy(), indices=indices[None].numpy())
                    for embeds, indices in zip(visual.embeds, visual.indices, strict=True)
                ]

    def embed(self, token_ids: Sequence[int]) -> Floats:
        """Embeddings of tokens, [1, L, width]."""
        with torch.inference_mode():
            ids = torch.tensor([list(token_ids)])
            embeds: Floats = embed_text(self._checkpoint, ids).numpy()
        return embeds

    def rows(self, prompt: Prompt) -> Rows:
        """The rows of a prompt."""
        seen = [self.features[picture] for picture in prompt.pictures]
        visual = VisualTokens(
            embeds=torch.from_numpy(np.concatenate([part.embeds for part in seen])),
            indices=torch.from_numpy(np.concatenate([part.indices for part in seen])),
        )
        with torch.inference_mode():
            token_ids = torch.tensor([prompt.token_ids])
            inputs = embed_prompts(self._checkpoint, token_ids, visual, prompt.grids)
        return Rows(
            embeds=inputs.wide.numpy(),
            positions=inputs.positions_of(0).numpy(),
            is_visual=inputs.is_visual[0].numpy(),
            next_position=int(inputs.next_position[0]),
            mutual=None if inputs.mutual is None else inputs.mutual[0].numpy(),
        )

    def answers(self, prompts: Sequence[Rows]) -> list[Floats]:
        """Logits [vocabulary] after each prompt."""
        return [logits[0] for logits in self.along(prompts, [()] * len(prompts))]

    def along(
        self, prompts: Sequence[Rows], continuations: Sequence[Sequence[int]]
    ) -> list[Floats]:
        """Logits after each prompt and after every token of its given continuation.

        Returns:
            One array [1 + tokens, vocabulary] a prompt.
        """
        width = prompts[0].embeds.shape[2]
        lengths = [rows.embeds.shape[1] for rows in prompts]
        ends = [length + len(more) for length, more in zip(lengths, continuations, strict=True)]
        embeds = torch.zeros(len(prompts), max(ends), width)
        axes = len(prompts[0].positions)
        positions = torch.zeros(axes, len(prompts), max(ends), dtype=torch.int64)
        is_visual = torch.zeros(len(prompts), max(ends), dtype=torch.bool)
        mutual = torch.full((len(prompts), max(ends)), -1)
        columns = torch.zeros(len(prompts), 1 + max(map(len, continuations)), dtype=torch.int64)
        for row, (rows, more) in enumerate(zip(prompts, continuations, strict=True)):
            start, end = lengths[row], ends[row]
            embeds[row, :start] = torch.from_numpy(rows.embeds[0])
            positions[:, row, :start] = torch.from_numpy(rows.positions)
            is_visual[row, :start] = torch.from_numpy(rows.is_visual)
            if rows.mutual is not None:
                mutual[row, :start] = torch.from_numpy(rows.mutual)
            if more:
                embeds[row, start:end] = torch.from_numpy(self.embed(more)[0])
            positions[:, row, start:] = rows.next_position + torch.arange(max(ends) - start)
            columns[row] = (start - 1 + torch.arange(columns.shape[1])).clamp(max=end - 1)
        embedded, added = split_rows(self._checkpoint.spec, embeds)
        inputs = DecoderInputs(
            embeds=embedded,
            added=added,
            positions=positions,
            is_visual=is_visual,
            next_position=positions[0, :, -1] + 1,
            mutual=mutual if self._checkpoint.spec.decoder.mutual_rows else None,
        )
        with torch.inference_mode():
            logits = decode_logits(self._checkpoint, inputs, columns=columns).numpy()
        return [logits[row, : 1 + len(more)] for row, more in enumerate(continuations)]


class ArtifactSide:
    """An engine, fed as the bundle's manifest says."""

    def __init__(self, runner: Runner, bundle: Bundle, pictures: Sequence[Floats]) -> None:
        self.runner = runner
        self._manifest = bundle.manifest
        self._rows = PictureRows.from_bundle(bundle)
        self.features: list[Features] = []
        for pixels in pictures:
            embeds, indices = runner.encode_image(pixels)
            self.features.append(Features(embeds=embeds, indices=indices))

    def rows(self, prompt: Prompt) -> Rows:
        """The rows of a prompt."""
        remaining = iter(self.features[picture] for picture in prompt.pictures)
        pictures: list[VisualFeatures] = []
        for grid in prompt.grids:
            tiles = [(tile.embeds, tile.indices) for tile in islice(remaining, grid.tiles)]
            pictures += self._rows.arrange(tiles, grid, serial=len(pictures))
        layout = lay_out_prompt(
            prompt.token_ids,
            pictures,
            image_token_id=self._manifest.prompt.image_token_id,
            keeps_positions=self._manifest.positions == "original",
            grid=self._manifest.position_grid,
        )
        kind = self._manifest.kv_cache.mutual_rows
        return prompt_rows(layout, pictures, self.runner, mutual_rows=kind)

    def answer(self, rows: Rows) -> Floats:
        """Logits [vocabulary] after rows without any before them."""
        self.runner.reset()
        logits = self.runner.decode(rows.embeds, rows.positions, rows.is_visual, rows.mutual)
        return logits.copy()

    def generate(self, rows: Rows, *, tokens: int, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
        """A greedy answer, token by token on the cache; its end token is part of it."""
        self.runner.reset()
        stop = StopRules(max_new_tokens=tokens, end_token_ids=eos_token_ids)
        return tuple(generate(self.runner, rows, stop))

    def answer_in_turns(self, rows: Rows, first: int) -> Floats:
        """Logits after rows that arrive as in a conversation.

        The first turn's prompt is one run, its answer comes token by token, and the second turn
        is one run on the cache that these left. Two rows of answer are enough to take that path.

        Args:
            rows: Both turns.
            first: Rows of the first turn's prompt.
        """
        self.runner.reset()
        ends = [first, first + 1, first + 2, rows.embeds.shape[1]]
        if rows.mutual is not None:  # rows that see each other come in one call
            numbers = rows.mutual
            ends = [end for end in ends[:-1] if not 0 <= numbers[end - 1] == numbers[end]] + ends[
                -1:
            ]
        for start, end in pairwise([0, *ends]):
            logits = self._decode(rows, slice(start, end))
        return logits.copy()

    def _decode(self, rows: Rows, part: slice) -> Floats:
        mutual = None if rows.mutual is None else rows.mutual[part]
        return self.runner.decode(
            rows.embeds[:, part], rows.positions[:, part], rows.is_visual[part], mutual
        )


@dataclass(frozen=True, kw_only=True)
class VisionAgreement:
    """Features of one picture on both sides.

    Attributes:
        overlap: Share of the checkpoint's tokens that the artifact kept too.
        relative_error: Of the features that both kept.
        cosine: Of the worst of these.
    """

    overlap: float
    relative_error: float
    cosine: float


def compare_features(found: Features, expected: Features) -> VisionAgreement:
    """Compares the tokens that both sides kept."""
    _, theirs, ours = np.intersect1d(found.indices[0], expected.indices[0], return_indices=True)
    if not len(ours):
        return VisionAgreement(overlap=0.0, relative_error=float("inf"), cosine=0.0)
    twins, shared = found.embeds[0, theirs], expected.embeds[0, ours]
    return VisionAgreement(
        overlap=len(ours) / max(found.indices.shape[1], expected.indices.shape[1]),
        relative_error=relative_error(twins, shared),
        cosine=min(cosine(a, b) for a, b in zip(twins, shared, strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class GreedyTrace:
    """A greedy answer of the artifact beside the checkpoint's, up to where they part.

    After the first token that differs the two have different prefixes, so nothing more is compared.

    Attributes:
        found: The artifact's tokens.
        expected: The checkpoint's, the first that differs included.
        margin: Where they part, how much more the checkpoint gave to its own choice than to the
            artifact's, in logits; `None` where they do not part.
    """

    found: tuple[int, ...]
    expected: tuple[int, ...]
    margin: float | None

    @property
    def compared(self) -> int:
        """Tokens chosen after the same tokens."""
        return len(self.expected)

    @property
    def equal(self) -> int:
        """Tokens that are the same."""
        return self.compared - (self.margin is not None)


def compare_greedy(found: tuple[int, ...], logits: Floats) -> GreedyTrace:
    """Compares a greedy answer with the checkpoint's choices after the same tokens.

    Args:
        found: The artifact's tokens.
        logits: The checkpoint's, [tokens, vocabulary]: row i after the first i tokens.
    """
    choices = [int(choice) for choice in logits.argmax(axis=1)]
    for step, (ours, theirs) in enumerate(zip(choices, found, strict=True)):
        if ours != theirs:
            margin = float(logits[step, ours] - logits[step, theirs])
            return GreedyTrace(found=found, expected=tuple(choices[: step + 1]), margin=margin)
    return GreedyTrace(found=found, expected=tuple(choices), margin=None)
