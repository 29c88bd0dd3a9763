"""Compares the loop of this package with ExecuTorch's own runner, both over a bundle's program."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketvlm.bundle import Bundle
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckFailedError
from pocketvlm.pipeline.questions import Questions, choose_samples
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.executorch.native_runner import (
    UnspeakablePieceError,
    answer_with_multimodal_runner,
)
from pocketvlm.runtime.executorch.runner import ExecutorchRunner
from pocketvlm.runtime.text import TextCodec

__all__ = ["NativeComparison", "compare_native_runner"]


@dataclass(frozen=True, kw_only=True)
class NativeComparison:
    """What both loops answered.

    Attributes:
        asked: Questions without earlier turns.
        compared: Those that `MultimodalRunner` can return the answer of: its Python binding cannot
            pass on a token that is part of a character.
        differences: Those that were answered in two ways, in one line each.
    """

    asked: int
    compared: int
    differences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {**asdict(self), "differences": list(self.differences)}

    def raise_if_failed(self) -> None:
        """Raises unless answers were compared and all are the same.

        Raises:
            CheckFailedError: They were not.
        """
        if self.differences:
            raise CheckFailedError(f"MultimodalRunner: {self.differences[0]}")
        if not self.compared:
            raise CheckFailedError(
                f"MultimodalRunner: none of {self.asked} answers can be compared: its Python "
                "binding returns no token that is part of a character; give other questions "
                "with --data"
            )


def compare_native_runner(path: Path, questions: Questions, ctx: RunContext) -> NativeComparison:
    """Asks the same questions of both.

    Args:
        path: The bundle.
        questions: The questions; the checkpoint is not used.
        ctx: The run, for progress and threads.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
        BundleError: The bundle has no program, or it does not load or run.
        InputError: The bundle has settings of generation, which `MultimodalRunner` does not know.
    """
    bundle = Bundle.open(path)
    # That runner keeps no conversation.
    samples = [one for one in choose_samples(bundle, questions) if len(one.turns) == 1]
    tokenizer = TextCodec.from_bundle(bundle).tokenizer
    compared, differences = 0, []
    with closing(ExecutorchRunner(bundle, threads=ctx.threads)) as runner:
        for number, sample in enumerate(samples, start=1):
            ctx.report("native runner", number, len(samples), sample.where)
            talk = Conversation(bundle, runner=runner)
            answer = talk.ask(sample.turns[0], sample.images, max_new_tokens=questions.tokens)
            # That runner has a word for every token, special ones included.
            ours = tokenizer.decode(answer.token_ids, skip_special_tokens=False)
            try:
                theirs = answer_with_multimodal_runner(
                    bundle,
                    sample.turns[0],
                    sample.images,
                    max_new_tokens=questions.tokens,
                    process=runner.process,
                )
            except UnspeakablePieceError:
                continue
            compared += 1
            if ours.strip() != theirs.strip():
                differences.append(f"{sample.where}: answers {theirs!r}, and this package {ours!r}")
    return NativeComparison(asked=len(samples), compared=compared, differences=tuple(differences))
