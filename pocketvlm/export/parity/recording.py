"""What an artifact says to the questions of a certificate, kept to be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pocketvlm.export.parity.artifact_side import ArtifactSide, Features, turn_border
from pocketvlm.export.parity.metrics import Floats
from pocketvlm.export.parity.questions import Questions

__all__ = ["Expected", "Recording", "record"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """What an artifact should say: a checkpoint's answers, or those of another machine.

    Attributes:
        features: Of each picture.
        embedding: Of every token of the prompts once, [1, tokens, width].
        logits: For each prompt [tokens, vocabulary], after it and after each token of the
            artifact's answer, as `compare_greedy` takes them.
        swapped: Logits [vocabulary] after each of `Questions.swapped`.
        at_once: Logits [vocabulary] after each of the follow-ups, run at once.
    """

    features: Sequence[Features]
    embedding: Floats
    logits: Sequence[Floats]
    swapped: Sequence[Floats]
    at_once: Sequence[Floats]


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording(Expected):
    """What an artifact said; `logits` are those that its own tokens were chosen from.

    Attributes:
        answers: Its greedy tokens, for each prompt.
        swapped_of: Which prompt each of `swapped` changes.
        chain: Logits [vocabulary] after each prompt, in a run of its own after all answers.
        in_two: Logits after each of the follow-ups, on the cache of a first turn.
    """

    answers: Sequence[tuple[int, ...]]
    swapped_of: Sequence[int]
    chain: Sequence[Floats]
    in_two: Sequence[Floats]


def record(
    artifact: ArtifactSide,
    questions: Questions,
    *,
    tokens: int,
    eos_token_ids: Sequence[int],
    report: Callable[[int, str], None],
) -> Recording:
    """Asks an artifact all questions.

    Args:
        artifact: It, with the features of all pictures.
        questions: The questions.
        tokens: Longest greedy answer.
        eos_token_ids: Tokens that end an answer.
        report: Called with the steps done, of three, and the name of the next one.
    """
    report(0, "greedy")
    rows = [artifact.rows(prompt) for prompt in questions.prompts]
    embedding = artifact.runner.embed(questions.token_ids()).copy()
    told = [artifact.generate(r, tokens=tokens, eos_token_ids=eos_token_ids) for r in rows]
    chain = [artifact.answer(row) for row in rows]
    report(1, "image swap")
    others = questions.swapped()
    swapped = [artifact.answer(artifact.rows(prompt)) for _, prompt in others]
    report(2, "two turns")
    again = [artifact.rows(prompt) for prompt in questions.follow_ups]
    at_once = [artifact.answer_at_once(row, turn_border(row)) for row in again]
    in_two = [artifact.answer_in_turns(row, turn_border(row)) for row in again]
    report(3, "done")
    return Recording(
        features=artifact.features,
        embedding=embedding,
        answers=[answer for answer, _ in told],
        logits=[logits for _, logits in told],
        chain=chain,
        swapped_of=[number for number, _ in others],
        swapped=swapped,
        at_once=at_once,
        in_two=in_two,
    )
