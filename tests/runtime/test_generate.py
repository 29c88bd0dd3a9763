"""The one generate loop: what it yields, why it stops, and which stages it tells."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.errors import InputError
from pocketvlm.runtime.answer import StopReason
from pocketvlm.runtime.generate import Rows, StopRules, generate
from pocketvlm.runtime.onnx.runner import OnnxRunner

CAPACITY = 8
IDS = [5, 9, 7]


@pytest.fixture(scope="module")
def runner(both_targets: Bundle) -> OnnxRunner:
    return OnnxRunner(both_targets, threads=1, capacity=CAPACITY)


def rows_of(runner: OnnxRunner) -> Rows:
    runner.reset()
    return Rows(
        embeds=runner.embed(IDS),
        positions=np.arange(len(IDS))[None],
        is_visual=np.zeros(len(IDS), np.bool_),
        next_position=len(IDS),
    )


def drain(tokens: Generator[int, None, StopReason]) -> tuple[list[int], StopReason]:
    found: list[int] = []
    while True:
        try:
            found.append(next(tokens))
        except StopIteration as end:
            return found, end.value


def test_tokens_are_the_likeliest_ones_and_every_stage_is_told(runner: OnnxRunner) -> None:
    laps: list[str] = []
    tokens, reason = drain(
        generate(runner, rows_of(runner), StopRules(max_new_tokens=3), lap=laps.append)
    )
    assert reason == "max_new_tokens"
    assert laps == ["prefill", "sample", "decode", "sample", "decode", "sample"]
    # The last token is never run: nobody asks what follows it.
    assert runner.length == len(IDS) + 2
    runner.reset()
    ids = IDS + tokens[:2]
    whole = runner.decode(runner.embed(ids), np.arange(len(ids))[None])
    assert int(whole.argmax()) == tokens[2]


def test_an_end_token_is_yielded_and_counts_before_the_length(runner: OnnxRunner) -> None:
    stop = StopRules(max_new_tokens=4)
    free, _ = drain(generate(runner, rows_of(runner), stop))
    stop = StopRules(max_new_tokens=free.index(free[-1]) + 1, end_token_ids=free[-1:])
    ended, reason = drain(generate(runner, rows_of(runner), stop))
    assert ended == free[: len(ended)]
    assert ended[-1] == free[-1]
    assert reason == "end"


@pytest.mark.parametrize(("positions", "tokens"), [(512, 6), (5, 3)])
def test_an_answer_ends_where_there_is_no_room(
    runner: OnnxRunner, positions: int, tokens: int
) -> None:
    stop = StopRules(max_new_tokens=100, max_positions=positions)
    found, reason = drain(generate(runner, rows_of(runner), stop))
    assert (len(found), reason) == (tokens, "capacity")


def test_a_caller_who_made_room_is_told_of_a_row_too_many(runner: OnnxRunner) -> None:
    with pytest.raises(InputError, match="rows"):
        drain(generate(runner, rows_of(runner), StopRules(max_new_tokens=100)))


def test_adjusted_logits_are_what_is_chosen_from(runner: OnnxRunner) -> None:
    seen: list[int] = []

    def only(logits: np.ndarray, said: Sequence[int]) -> np.ndarray:
        seen.append(len(said))
        return np.where(np.arange(logits.size) == 10 + len(said), 1, 0).astype(np.float32)

    tokens, _ = drain(generate(runner, rows_of(runner), StopRules(max_new_tokens=3), adjust=only))
    assert tokens == [10, 11, 12]
    assert seen == [0, 1, 2]
