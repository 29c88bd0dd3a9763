"""What a runner says is held against the job and against the clock, before any figure is made.

Types were checked when it was decoded. Here an answer that is longer than asked for, a stage that
takes less than nothing, or a clock that was set while it was read makes the process a failure with
a reason, and none of its figures count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from pocketvlm.device_bench.block import AnswerTimes, Block
from pocketvlm.device_bench.protocol import AnswerEvent, BlockJob, Event

__all__ = ["find_contradiction"]

# Every time has its own readings of the clock.
_ALLOWANCE = 1.02
_LEAST_MS = 1.0
# Between two answers a runner reads its sensors, and does nothing else.
_LONGEST_PAUSE_MS = 10_000.0


def find_contradiction(
    block: Block, job: BlockJob, events: Sequence[Event], *, elapsed_s: float | None, is_whole: bool
) -> str | None:
    """The first thing in a block that cannot be.

    Args:
        block: What a process measured.
        job: What it was asked for.
        events: Its events, in order.
        elapsed_s: Seconds until its end by this machine's clock; `None` if they tell nothing.
        is_whole: Whether the process came to its end.

    Returns:
        One line, or `None` if everything fits.
    """
    return next(_contradictions(block, job, events, elapsed_s, is_whole=is_whole), None)


def _contradictions(
    block: Block, job: BlockJob, events: Sequence[Event], elapsed_s: float | None, *, is_whole: bool
) -> Iterator[str]:
    later = len(job.turns) - 1
    if is_whole and len(block.answers) != job.answers:
        yield f"{len(block.answers)} measured answers where {job.answers} were asked for"
    if is_whole and [len(turn) for turn in block.later_turns] != [job.answers] * later:
        yield f"it does not have the {later} later turns of every answer"
    rows, visual = block.prompt.tokens, block.prompt.visual_tokens
    if rows is not None and visual is not None and not 0 <= visual <= rows:
        yield f"it counts {visual} visual rows in a prompt of {rows}"
    if block.load_ms < 0:
        yield f"load_ms is {block.load_ms:g}"
    turns = [[block.cold, *block.answers], *block.later_turns]
    for turn, answers in zip(job.turns, turns, strict=False):
        for answer in answers:
            yield from _in_answer(answer, job, has_pictures=bool(turn.pictures))
    yield from _in_clock([event for event in events if isinstance(event, AnswerEvent)])
    told_s = (block.load_ms + sum(map(_duration_ms, _all(turns)))) / 1e3
    if elapsed_s is not None and told_s > elapsed_s * _ALLOWANCE + _LEAST_MS / 1e3:
        yield f"its answers take {told_s:.1f} s, and the process took {elapsed_s:.1f} s"


def _all(turns: Iterable[Sequence[AnswerTimes]]) -> Iterator[AnswerTimes]:
    for answers in turns:
        yield from answers


def _in_answer(answer: AnswerTimes, job: BlockJob, *, has_pictures: bool) -> Iterator[str]:
    if answer.new_tokens > job.new_tokens or (
        job.ignore_eos and answer.new_tokens != job.new_tokens
    ):
        yield f"an answer has {answer.new_tokens} tokens where {job.new_tokens} were asked for"
    if answer.new_tokens < 1 or answer.prompt_tokens < 1:
        yield "an answer has no tokens, or no prompt"
    counts = len(answer.sample_ms), len(answer.detokenize_ms), len(answer.decode_ms) + 1
    if set(counts) != {answer.new_tokens}:
        yield f"an answer of {answer.new_tokens} tokens has {', '.join(map(str, counts))} times"
    if has_pictures != (answer.vision_ms is not None):
        word = "with" if has_pictures else "without"
        yield f"vision_ms is {answer.vision_ms} in a turn {word} a picture"
    stages = (
        *(answer.preprocess_ms or 0.0, answer.vision_ms or 0.0, answer.tokenize_ms),
        *(answer.embed_ms, answer.prefill_ms),
    )
    steps = (*answer.sample_ms, *answer.detokenize_ms, *answer.decode_ms)
    spans = (answer.ttft_user_ms, answer.ttft_engine_ms, answer.decode_span_ms)
    least = min((*stages, *steps, *spans))
    if least < 0:
        yield f"the clock went backwards: a stage takes {least:g} ms"
    if sum(stages) > answer.ttft_user_ms * _ALLOWANCE + _LEAST_MS:
        yield (
            f"the stages before the first token take {sum(stages):.1f} ms, and "
            f"ttft_user_ms is {answer.ttft_user_ms:.1f}"
        )
    if sum(answer.decode_ms) > answer.decode_span_ms * _ALLOWANCE + _LEAST_MS:
        yield (
            f"decoding takes {sum(answer.decode_ms):.1f} ms, and decode_span_ms is "
            f"{answer.decode_span_ms:.1f}"
        )


def _duration_ms(answer: AnswerTimes) -> float:
    return answer.ttft_user_ms + answer.decode_span_ms


def _in_clock(answers: Sequence[AnswerEvent]) -> Iterator[str]:
    """Answers follow each other: the clock must advance by each one's duration, and little more."""
    for before, after in pairwise(answers):
        pause_ms = after.at_ms - before.at_ms - _duration_ms(after.times)
        if pause_ms < -_LEAST_MS - (_ALLOWANCE - 1) * _duration_ms(after.times):
            yield f"the clock was set back by {-pause_ms:.0f} ms during a measurement"
        if pause_ms > _LONGEST_PAUSE_MS:
            yield f"the clock was set forward, or the runner slept, for {pause_ms:.0f} ms"
