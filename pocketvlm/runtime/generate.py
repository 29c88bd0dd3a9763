"""The generate loop: rows of a prompt in, tokens out, over any `Runner`.

Conversations, evaluation, the benchmark and the certificate run this one loop. They differ in when
it stops, in what is done to the logits, and in who watches the time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import MutualRows
from pocketvlm.runtime.answer import StopReason
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.sampling import GREEDY, Sampling
from pocketvlm.runtime.splice import PromptLayout, VisualFeatures, embed_rows

__all__ = ["Rows", "StopRules", "generate", "prompt_rows"]

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """A prompt after the splice, or the end of one whose start is in the cache.

    Attributes:
        embeds: float32 [1, rows, width].
        positions: int64 [axes, rows].
        is_visual: bool [rows]: which come from a picture.
        mutual: int64 [rows], as `Runner.decode` takes it.
        next_position: Rotary position of the first generated token.
    """

    embeds: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64]
    is_visual: npt.NDArray[np.bool_]
    next_position: int
    mutual: npt.NDArray[np.int64] | None = None


def prompt_rows(
    layout: PromptLayout,
    pictures: Sequence[VisualFeatures],
    runner: Runner,
    *,
    mutual_rows: MutualRows | None,
    start: int = 0,
) -> Rows:
    """The rows of a prompt from `start` on, embedded by a runner.

    Args:
        layout: The prompt.
        pictures: Features of its pictures.
        runner: The engine.
        mutual_rows: Which rows see each other, as the manifest's `kv_cache` says.
        start: Rows before it are in the cache already.
    """
    mutual = layout.mutual(mutual_rows)
    return Rows(
        embeds=embed_rows(layout, pictures, runner.embed, start=start),
        positions=layout.positions[:, start:],
        is_visual=layout.is_visual[start:],
        next_position=layout.next_position,
        mutual=None if mutual is None else mutual[start:],
    )


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When an answer ends.

    Attributes:
        max_new_tokens: Tokens after which it is cut, the end token counted.
        end_token_ids: Tokens that end it; none to continue after them.
        max_positions: Positions of the model: an answer that has no room for another row, there or
            in the runner's cache, ends. `None` where the caller has made room; the runner then
            refuses a row too many.
    """

    max_new_tokens: int
    end_token_ids: Collection[int] = ()
    max_positions: int | None = None


def generate(
    runner: Runner,
    rows: Rows,
    stop: StopRules,
    *,
    sampling: Sampling = GREEDY,
    adjust: Callable[[Logits, Sequence[int]], Logits] = lambda logits, _: logits,
    lap: Callable[[str], None] = lambda _: None,
) -> Generator[int, None, StopReason]:
    """Runs a prompt on what the runner's cache holds and generates an answer.

    A token is yielded before its row is run, so that a caller can show it, or stop, at once.

    Args:
        runner: The engine.
        rows: What is new in the prompt, at least one row.
        stop: When the answer ends.
        sampling: How tokens are chosen.
        adjust: Applied to logits [vocabulary] and the tokens so far, before each choice.
        lap: Called with `prefill`, `decode` or `sample` when that stage ends.

    Yields:
        Tokens, the one that ends the answer included.

    Returns:
        Why the answer ended.
    """
    generator = sampling.generator()
    axes = len(rows.positions)
    token_ids: list[int] = []
    logits = runner.decode(rows.embeds, rows.positions, rows.is_visual, rows.mutual)
    lap("prefill")
    while True:
        token = sampling.choose(adjust(logits, token_ids), generator)
        lap("sample")
        yield token
        if token in stop.end_token_ids:
            return "end"
        position = rows.next_position + len(token_ids)
        token_ids.append(token)
        if len(token_ids) == stop.max_new_tokens:
            return "max_new_tokens"
        if stop.max_positions is not None and not (
            runner.length < runner.capacity and position < stop.max_positions
        ):
            return "capacity"
        logits = runner.decode(runner.embed([token]), np.full((axes, 1), position, np.int64))
        lap("decode")
