"""What an artifact says, through any runner, and how it compares with what was expected.

Prompts are laid out by `runtime.splice`, as in an app, so that what differs there is found too.
Nothing is judged here; `certificate.py` does that. Nothing here needs torch: `recorder.py` runs it
on machines that have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle
from pocketvlm.export.parity.metrics import Floats, cosine, relative_error
from pocketvlm.export.parity.questions import Prompt
from pocketvlm.runtime.generate import Rows, StopRules, generate, prompt_rows
from pocketvlm.runtime.picture_rows import PictureRows, TileFeatures
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.splice import VisualFeatures, lay_out_prompt

__all__ = [
    "ArtifactSide",
    "Features",
    "GreedyTrace",
    "VisionAgreement",
    "compare_features",
    "compare_greedy",
    "turn_border",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What a vision graph returned: embeds float32 [1, k, width] and indices int64 [1, k]."""

    embeds: Floats
    indices: npt.NDArray[np.int64]


class ArtifactSide:
    """An engine, fed as the bundle's manifest says."""

    def __init__(self, runner: Runner, bundle: Bundle, pictures: Sequence[Floats]) -> None:
        self.runner = runner
        self._manifest = bundle.manifest
        self._rows = PictureRows.from_bundle(bundle)
        self._pictures = pictures
        self._seen: dict[tuple[int, str | None], TileFeatures] = {}
        self.features: list[Features] = []
        for picture in range(len(pictures)):
            embeds, indices = self._see((picture,), 0, None)
            self.features.append(Features(embeds=embeds, indices=indices))

    def rows(self, prompt: Prompt) -> Rows:
        """The rows of a prompt."""
        remaining = iter(prompt.pictures)
        pictures: list[VisualFeatures] = []
        for grid in prompt.grids:
            own = list(islice(remaining, grid.tiles))
            pixels = np.concatenate([self._pictures[picture] for picture in own])
            tiles = self._rows.look(partial(self._see, own), pixels, grid)
            pictures += self._rows.arrange(tiles, grid, serial=len(pictures))
        layout = lay_out_prompt(
            prompt.token_ids,
            pictures,
            image_token_id=self._manifest.prompt.image_token_id,
            keeps_positions=self._manifest.positions == "original",
            axes=self._manifest.position_axes,
        )
        kind = self._manifest.kv_cache.mutual_rows
        return prompt_rows(layout, pictures, self.runner, mutual_rows=kind)

    def _see(self, pictures: Sequence[int], place: int, variant: str | None) -> TileFeatures:
        """What a vision graph returns for one of some pictures, run once."""
        key = pictures[place], variant
        if key not in self._seen:
            self._seen[key] = self.runner.encode_image(self._pictures[key[0]], variant)
        return self._seen[key]

    def answer(self, rows: Rows) -> Floats:
        """Logits [vocabulary] after rows without any before them."""
        self.runner.reset()
        logits = self.runner.decode(rows.embeds, rows.positions, rows.is_visual, rows.mutual)
        return logits.copy()

    def answer_at_once(self, rows: Rows, first: int) -> Floats:
        """Logits after two turns in as few runs as give the same.

        That is one, unless the last row of a run decides which of its visual rows are kept.

        Args:
            rows: Both turns.
            first: Rows of the first turn's prompt.
        """
        schedule = self._manifest.kv_cache.visual_schedule
        if schedule is None or not schedule.is_ranked:
            return self.answer(rows)
        self.runner.reset()
        self._decode(rows, slice(0, first))
        return self._decode(rows, slice(first, None)).copy()

    def generate(
        self, rows: Rows, *, tokens: int, eos_token_ids: Sequence[int]
    ) -> tuple[tuple[int, ...], Floats]:
        """A greedy answer, token by token on the cache.

        Returns:
            Its tokens, the one that ends it included, and the logits [tokens, vocabulary] that each
            was chosen from.
        """
        self.runner.reset()
        seen: list[Floats] = []

        def keep(logits: Floats, _said: Sequence[int]) -> Floats:
            seen.append(logits.copy())
            return logits

        stop = StopRules(max_new_tokens=tokens, end_token_ids=eos_token_ids)
        answer = tuple(generate(self.runner, rows, stop, adjust=keep))
        return answer, np.stack(seen)

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


def turn_border(rows: Rows) -> int:
    """Rows of what counts as a first turn: a cache knows rows, not turns, but text ends a turn."""
    border = len(rows.is_visual) * 2 // 3
    visual = np.flatnonzero(rows.is_visual)
    # Two rows of text at least end the first, and one row begins the second.
    return min(max(border, int(visual[-1]) + 2 if len(visual) else 0), len(rows.is_visual) - 3)


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
    """A greedy answer of the artifact beside the other side's, up to where they part.

    After the first token that differs the two have different prefixes, so nothing more is compared.

    Attributes:
        found: The artifact's tokens.
        expected: The other side's, the first that differs included.
        margin: Where they part, how much more the other side gave to its own choice than to the
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
    """Compares a greedy answer with another side's choices after the same tokens.

    Args:
        found: The artifact's tokens.
        logits: The other side's, [tokens, vocabulary]: row i after the first i tokens of `found`,
            or, after its own choice differs, after anything.
    """
    choices = [int(choice) for choice in logits.argmax(axis=1)]
    for step, (ours, theirs) in enumerate(zip(choices, found, strict=True)):
        if ours != theirs:
            margin = float(logits[step, ours] - logits[step, theirs])
            return GreedyTrace(found=found, expected=tuple(choices[: step + 1]), margin=margin)
    return GreedyTrace(found=found, expected=tuple(choices), margin=None)
