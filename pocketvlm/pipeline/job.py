"""Job: the main job as given on the command line, with names resolved and defaults filled in.

What runs a job is imported by the methods that do, so that a plan does not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.context import ALONE, ProgressCallback, Ranks, RunContext, ignore_progress
from pocketvlm.pipeline.compute_device import resolve_device
from pocketvlm.pipeline.plan import Plan, plan
from pocketvlm.pipeline.sources import (
    GENERATED_SOURCES,
    find_model,
    load_evaluation,
    resolve_calibration,
    resolve_model,
    select_targets,
)
from pocketvlm.recipes.load import Recipe, load_recipe
from pocketvlm.reference import REFERENCE_MODELS, Pictures

if TYPE_CHECKING:
    from pocketvlm.pipeline.run import RunResult
    from pocketvlm.pipeline.source_check import SourceCheckMode

__all__ = ["Job", "SceneAnswer"]


@dataclass(frozen=True, kw_only=True)
class SceneAnswer:
    """One question about one generated scene, answered by the bundle.

    Attributes:
        image: Path of the picture.
        expected: The right answer.
    """

    image: Path
    question: str
    answer: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """The user's request.

    Attributes:
        model: A name that `resolve_model` understands.
        recipe: A recipe's name or file.
        targets: Export formats instead of the recipe's.
        settings: `a.b=c` changes to the recipe.
        calibration: A calibration source instead of the recipe's.
        data: Questions to score, `none`, or `None` for the default of the model.
        n: The number of questions.
        bench: Whether the bundle is timed.
        baseline: Whether it is timed together with the float32 export.
        source_check: Whether the checkpoint is first compared with the stock classes.
        device: Where stages compute: `cpu`, `cuda`, `cuda:N` or `mps`.
    """

    model: str
    recipe: str = "int4-balanced"
    targets: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    calibration: str | None = None
    data: str | None = None
    n: int = 200
    bench: bool = True
    baseline: bool = True
    source_check: SourceCheckMode = "require"
    seed: int = 0
    device: str = "cpu"
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    command: str = ""

    def run(
        self,
        out: Path,
        *,
        ranks: Ranks = ALONE,
        on_progress: ProgressCallback = ignore_progress,
    ) -> RunResult:
        """Plans, then runs.

        Args:
            out: The run folder.
            ranks: The processes that share the run; the others call `help_run`.
            on_progress: Told of every step.

        Raises:
            PocketVLMError: Something about the input is wrong; found before any compute if
                possible.
        """
        from pocketvlm.device_bench.workload import load_workload
        from pocketvlm.pipeline.float_baseline import make_float_baseline
        from pocketvlm.pipeline.run import run

        ctx = self._context(ranks, on_progress)
        recipe = self._recipe()
        path = resolve_model(self.model)
        plan(path, recipe).raise_if_refused()
        pictures = self._pictures()
        calibration = resolve_calibration(recipe.calibration, pictures=pictures)
        wants_baseline = self.bench and self.baseline and recipe.stages
        return run(
            path,
            recipe,
            out=out,
            calibration=calibration,
            ctx=ctx,
            evaluation=self._evaluation(pictures),
            workload=load_workload("vlm") if self.bench else None,
            baseline=(lambda: make_float_baseline(path, out, ctx)) if wants_baseline else None,
            source_check=self.source_check,
            command=self.command,
        )

    def help_run(self, ranks: Ranks) -> None:
        """Does this process's part of a run that another one owns.

        Raises:
            RankError: Another process has ended, or the processes do not work on the same run.
            PocketVLMError: Something about the input is wrong.
        """
        from pocketvlm.pipeline.shared_run import help_run

        ctx = self._context(ranks, ignore_progress)
        recipe = self._recipe()
        calibration = resolve_calibration(recipe.calibration, pictures=self._pictures())
        help_run(resolve_model(self.model), recipe, calibration=calibration, ctx=ctx)

    def plan(
        self, *, device: str | None = None, advises: bool = False, measured: Sequence[Path] = ()
    ) -> Plan:
        """Plans, checking every row of the given folders, and computes nothing.

        Args:
            device: Name of a device profile whose memory the result must fit.
            advises: Whether the plan says what pays.
            measured: Scored runs of the model, for the advice.

        Raises:
            PocketVLMError: Something about the input is wrong.
        """
        recipe = self._recipe()
        options = recipe.calibration
        is_folder = options.source not in GENERATED_SOURCES
        return plan(
            find_model(self.model),
            recipe,
            device=device,
            calibration=resolve_calibration(options, pictures=None) if is_folder else None,
            evaluation=self._evaluation(None),
            advises=advises,
            measured=measured,
        )

    def _context(self, ranks: Ranks, on_progress: ProgressCallback) -> RunContext:
        return RunContext(
            seed=self.seed,
            threads=self.threads,
            device=resolve_device(self.device),
            ranks=ranks,
            on_progress=on_progress,
        )

    def _recipe(self) -> Recipe:
        recipe = select_targets(load_recipe(self.recipe, self.settings), self.targets)
        if self.calibration is None:
            return recipe
        options = replace(recipe.calibration, source=self.calibration)
        return replace(recipe, calibration=options)

    def ask_about_a_scene(self, result: RunResult) -> SceneAnswer:
        """Asks the finished bundle about one held-out scene, whose picture is stored next to it."""
        from pocketvlm.bundle import Bundle
        from pocketvlm.files.publish import replace_file
        from pocketvlm.reference.mosaics import GENERATORS
        from pocketvlm.runtime.conversation import Conversation

        generate = GENERATORS[self._pictures() or "reference"]
        example = next(generate(7, 1, split="evaluation"))
        picture = result.out / "scene.png"
        with replace_file(picture) as aside:
            example.image.save(aside, format="PNG")
        conversation = Conversation(Bundle.open(result.out / "bundle"))
        answer = conversation.ask(example.question, image=picture)
        return SceneAnswer(
            image=picture,
            question=example.question,
            answer=answer.text,
            expected=example.answer,
        )

    def _pictures(self) -> Pictures | None:
        """What a reference model was trained on."""
        scheme, _, name = self.model.partition(":")
        return REFERENCE_MODELS.get(name) if scheme == "reference" else None

    def _evaluation(self, pictures: Pictures | None) -> CalibrationSet | None:
        data = self.data or (f"{pictures}:1" if pictures else "none")
        return None if data == "none" else load_evaluation(data, self.n)
