"""What a schedule costs: multiplications of the decoder's prefill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pocketvlm.bundle import VisualSchedule
from pocketvlm.models.blocks import BlockSpec
from pocketvlm.models.spec import ModelSpec

__all__ = ["PrefillMacs"]


@dataclass(frozen=True, kw_only=True)
class PrefillMacs:
    """Multiplications, each with an addition, of a decoder's layers for some prompts.

    Counted are products with weights, attention of every row to every row, as kernels compute it,
    and the scores that rank. Not counted is the head, which runs for one row under any schedule.

    Attributes:
        spec: The model.
        weights: By block, elements of the matrices before attention and of those after it.
        prompts: How many prompts have a number of rows of text and of visual rows.
    """

    spec: ModelSpec
    weights: tuple[tuple[int, int], ...]
    prompts: Mapping[tuple[int, int], int]

    @classmethod
    def of(cls, spec: ModelSpec, prompt_rows: Iterable[tuple[int, int]]) -> PrefillMacs:
        """Of a model and its prompts, each of some rows of text and some visual rows."""
        sizes = {linear.name: linear.out_features * linear.in_features for linear in spec.linears()}

        def weigh(names: Iterable[str]) -> int:
            return sum(sizes[name] for name in names)

        return cls(
            spec=spec,
            weights=tuple(
                (
                    weigh(block.mixer.inputs),
                    weigh((block.mixer.output, *block.ffn.inputs, block.ffn.down)),
                )
                for block in spec.decoder.blocks
            ),
            prompts=Counter(prompt_rows),
        )

    def mean(self, schedule: VisualSchedule | None) -> float:
        """The mean over prompts, of which each has a picture."""
        total = sum(count * self._one(schedule, *rows) for rows, count in self.prompts.items())
        return total / sum(self.prompts.values())

    def share(self, schedule: VisualSchedule | None) -> float:
        """The same, as a share of what it is where no row leaves."""
        return self.mean(schedule) / self.mean(None)

    def _one(self, schedule: VisualSchedule | None, text_rows: int, visual_rows: int) -> int:
        decoder = self.spec.decoder
        width, total = decoder.heads * decoder.head_dim, 0
        for index, (block, (read, rest)) in enumerate(
            zip(decoder.blocks, self.weights, strict=True)
        ):
            entering = attending = after = text_rows + visual_rows
            if schedule is not None:
                stage = schedule.stage_of(index)
                early = schedule.drop_in(index, after_attention=False)
                late = schedule.drop_in(index, after_attention=True)
                entering = attending = after = text_rows + schedule.kept(stage, visual_rows)
                if early is not None:
                    entering = text_rows + schedule.kept(stage - 1, visual_rows)
                if late is not None:
                    after = text_rows + schedule.kept(stage + 1, visual_rows)
                if any(drop is not None and schedule.drops[drop].keep for drop in (early, late)):
                    total += entering * width
            if index == decoder.depth - 1:
                after = 1  # only the last row of the last layer is read
            total += entering * read + after * rest
            if isinstance(block, BlockSpec):
                total += 2 * attending**2 * width
        return total
