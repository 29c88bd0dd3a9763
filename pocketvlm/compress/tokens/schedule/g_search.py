"""As few visual tokens in each layer as lose no answer, found greedily from the first layer on.

G-Search (Zhao et al., arXiv 2412.00556): the tokens that a layer needs are among those that the
layer before it needs, so layers are settled one after another, and for each the smallest share is
taken with which the answers of a calibration set stay as good as they are. What differs: published
is Bayesian optimisation over the share; here the number of tokens is bisected, which is exact where
fewer tokens never answer better, takes log2(N) trials, and in any case ends with a number that was
tried. A trial runs only the layers that are not settled yet. And the loss of the answers' tokens
may not rise either: answers stay right until just before they turn wrong, and steps that each use
up what is left do not hold on other questions (docs/methods/schedule_search.md).
Rows are ranked by the attention that the last row pays in the layer before, as in FastV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pocketvlm.bundle import VisualDrop, VisualSchedule
from pocketvlm.calibration.gradients.schedule_trials import GivenAnswers, ScheduleTrials
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.schedule.kind import FoundSchedule, SearchedSchedule
from pocketvlm.compress.tokens.schedule.prefill_macs import PrefillMacs
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError

__all__ = ["GSearch", "fewest"]


def fewest(passes: Callable[[int], bool], most: int) -> int:
    """The smallest number that passes, if every larger one up to `most` passes as well.

    `most` is taken to pass. If passing has gaps, the result still passes.
    """
    failed, passed = -1, most
    while passed - failed > 1:
        middle = (failed + passed) // 2
        if passes(middle):
            passed = middle
        else:
            failed = middle
    return passed


@dataclass(frozen=True, kw_only=True)
class GSearch(SearchedSchedule):
    """Searches the fewest visual tokens of each layer that lose no answer.

    Attributes:
        tolerance: Share of the calibration samples whose answers may be lost.
        loss_tolerance: Nats by which the answers' mean loss may rise; `None` for any number, as
            published.
    """

    kind: Literal["g_search"] = "g_search"
    tolerance: float = 0.0
    loss_tolerance: float | None = 0.0

    def __post_init__(self) -> None:
        if self.loss_tolerance is not None and not self.loss_tolerance >= 0:
            raise ValueError(
                f"loss_tolerance is {self.loss_tolerance!r}; allowed are nats of at least 0 or null"
            )
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance!r}; allowed is a share in [0, 1)")

    def _is_enough(self, answers: GivenAnswers, plain: GivenAnswers) -> bool:
        """Whether answers are as good as those without a schedule, up to what is tolerated."""
        if answers.right < plain.right - self.tolerance * len(plain.losses):
            return False
        return self.loss_tolerance is None or answers.loss <= plain.loss + self.loss_tolerance

    def find(
        self, checkpoint: Checkpoint, samples: CalibrationSet, ctx: RunContext
    ) -> FoundSchedule:
        """Settles one layer after another.

        Raises:
            RecipeError: No layer can lose a token.
        """
        spec = checkpoint.spec
        depth = spec.decoder.depth
        tokens = left = checkpoint.visual_tokens
        trials = ScheduleTrials(checkpoint, samples)
        drops: tuple[VisualDrop, ...] = ()
        rows: list[dict[str, Any]] = []
        tried = 0

        def with_drop(layer: int, keep: int) -> VisualSchedule:
            more = VisualDrop(layers=layer, keep=keep)
            return VisualSchedule(drops=(*drops, more), tokens=tokens)

        for layer in range(1, depth):
            settled = VisualSchedule(drops=drops, tokens=tokens) if drops else None
            trials.settle(settled, layer - 1)

            def passes(keep: int, layer: int = layer) -> bool:
                nonlocal tried
                tried += 1
                return self._is_enough(trials.answers(with_drop(layer, keep)), trials.plain)

            keep = fewest(passes, left)
            if keep < left:
                drops, left = with_drop(layer, keep).drops, keep
            rows.append({"name": f"decoder layer {layer}", "block": layer, "visual_tokens": left})
            ctx.report("drop_tokens", layer, depth - 1, "layers of the search")
            if not left:
                break
        if not drops:
            raise RecipeError(
                "drop_tokens: no layer can lose a visual token without losing more than tolerance "
                f"{self.tolerance:g} and loss_tolerance {self.loss_tolerance} allow on the "
                "calibration samples"
            )
        found = VisualSchedule(drops=drops, tokens=tokens)
        answers, plain = trials.answers(found), trials.plain
        macs = PrefillMacs.of(spec, trials.prompt_rows)
        return FoundSchedule(
            schedule=found,
            layers=tuple(rows),
            metrics={
                "prefill_macs_share": macs.share(found),
                "trials": tried,
                "samples": len(samples),
                "right": answers.right,
                "right_before": plain.right,
                "answer_loss": answers.loss,
                "answer_loss_before": plain.loss,
            },
        )
