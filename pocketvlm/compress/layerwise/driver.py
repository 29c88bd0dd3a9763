"""The one walk of everything that compresses layer by layer.

Layers are visited in order of execution, so that each is measured on what the compressed layers
before it produce, with the visual tokens that the phone will see. A `LayerMethod` says what becomes
of a layer; finished layers are stored, and an interrupted run resumes at the first that is missing.

Processes that share a run measure their own samples and share what they have measured. Of the
layers that read one input each compresses its own, and all are given every layer as its file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pocketvlm.calibration.walk.activations import MAIN_MEMORY
from pocketvlm.calibration.walk.steps import FinishedSublayer, LinearGroup
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.hessian import (
    NO_FEEDBACK,
    ErrorFeedback,
    InputHessian,
    diagonal_block_width,
)
from pocketvlm.compress.layerwise.layer_store import FinishedLayer, LayerStore
from pocketvlm.context import Ranks, RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.machine import return_free_memory
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.form import WeightForm

__all__ = [
    "LayerMethod",
    "LayerTask",
    "LayerwiseRun",
    "compress_layers",
    "measure_hessian",
    "visit_groups",
]

_REVISED = ".revised"
# An element of a tied table is wrong twice: in the logits and in what enters the decoder. Chosen on
# separate questions; see docs/methods/gptq.md.
_LOOKUP_SHARE = 0.3


class LayerTask(Protocol):
    """What is to become of one layer."""

    @property
    def linear(self) -> LinearSpec:
        """The layer."""


TaskT = TypeVar("TaskT", bound=LayerTask)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerMethod(ABC, Generic[TaskT]):
    """How the layers of one run are compressed; made for each run, so it may remember.

    Attributes:
        feedback: How Hessians are factorized.
        on_device: Whether it works where the model computes; else it is given Hessians in main
            memory.
    """

    feedback: ErrorFeedback = NO_FEEDBACK
    on_device: ClassVar[bool] = False

    @abstractmethod
    def compress(
        self, task: TaskT, weight: WeightForm, hessian: InputHessian | None
    ) -> FinishedLayer:
        """Compresses a layer, and describes what became of it.

        Args:
            task: What is to become of it.
            weight: Its weight.
            hessian: Of its input; `None` where it has none that could be measured, as a lookup, or
                where the run measures nothing.

        Raises:
            CalibrationError: What was measured is not finite.
            CheckpointError: The weight cannot be stored in the form that it should have.
        """

    def columns_together(self, task: TaskT) -> int | None:
        """Columns of a group that no border between diagonal blocks may cut; `None` for any."""
        return None

    def revise(
        self,
        checkpoint: Checkpoint,
        sublayer: FinishedSublayer,
        layers: Mapping[str, FinishedLayer],
    ) -> Mapping[str, FinishedLayer]:
        """Better versions of the layers of a finished sublayer, all of those that are given."""
        return layers


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerwiseRun(Generic[TaskT]):
    """What one run does to which layers.

    Attributes:
        title: Name of the work in progress reports.
        tasks: What is to become of each layer, by its name, in order of execution.
        begin: Makes the method; not called where all layers were finished by an earlier run.
        walk: Over the model; `None` for methods that look at no input.
        revised: Layers that are given a second form when their sublayer is finished.
        note: What a progress report says of a finished layer, from its row.
    """

    title: str
    tasks: Mapping[str, TaskT]
    begin: Callable[[], LayerMethod[TaskT]]
    walk: BlockWalk | None
    revised: frozenset[str] = frozenset()
    note: Callable[[Mapping[str, Any]], str]


def compress_layers(
    checkpoint: Checkpoint, run: LayerwiseRun[TaskT], ctx: RunContext
) -> dict[str, Mapping[str, Any]]:
    """Compresses layers in place, each before the inputs of the next are measured.

    Returns:
        The row of each layer for the report, by its name.

    Raises:
        CalibrationError: A sample cannot be used, or what is measured is not finite.
        CheckpointError: A weight cannot be stored in the form that it should have.
        StorageError: The disk is full.
    """
    store = LayerStore(ctx.scratch_dir)
    done = _load(store, run.tasks, ctx.ranks)
    revised = _load(store, run.revised, ctx.ranks, _REVISED)
    rows: dict[str, Mapping[str, Any]] = {}

    def place(name: str, layer: FinishedLayer) -> None:
        checkpoint.set_form(name, layer.form)
        is_new = name not in rows
        rows[name] = layer.row
        if is_new:
            ctx.report(run.title, len(rows), len(run.tasks), f"{name}: {run.note(layer.row)}")

    if done.keys() == run.tasks.keys() and revised.keys() == run.revised:
        for name, layer in (done | revised).items():
            place(name, layer)
        return rows
    method = run.begin()

    def compress_group(group: LinearGroup | None, tasks: Mapping[str, TaskT]) -> None:
        # The Hessian is dropped with this frame, before the walk continues.
        hessian = None
        if group is not None and tasks.keys() - done.keys():
            hessian = measure_hessian(checkpoint, group, tasks.values(), method)
        order = list(tasks)
        for start in range(0, len(order), ctx.ranks.count):
            names = order[start : start + ctx.ranks.count]
            missing = [name for name in names if name not in done]
            for name in ctx.ranks.own(missing):
                made = method.compress(tasks[name], checkpoint.form(name), hessian)
                done[name] = store.save(name, made)
                del made
                return_free_memory()
            for owner, name in enumerate(missing if ctx.ranks.count > 1 else ()):
                done[name] = store.share(name, ctx.ranks, owner)
            for name in names:
                place(name, done[name])

    if run.walk is None:
        compress_group(None, run.tasks)
        return rows
    left = len(run.tasks) + len(run.revised)
    for step in run.walk:
        if isinstance(step, FinishedSublayer):
            names = [name for name in step.names if name in run.revised]
            if any(name not in revised for name in names):
                better = method.revise(checkpoint, step, {name: done[name] for name in names})
                for name, layer in better.items():
                    revised[name] = store.save(name + _REVISED, layer)
            for name in names:
                place(name, revised[name])
        else:
            names = [name for name in step.names if name in run.tasks]
            compress_group(step, {name: run.tasks[name] for name in names})
        left -= len(names)
        if not left:
            break
    return rows


def measure_hessian(
    checkpoint: Checkpoint,
    group: LinearGroup,
    tasks: Collection[TaskT],
    method: LayerMethod[TaskT],
) -> InputHessian | None:
    """The Hessian of the input that some layers share; `None` for a table that is only looked up.

    Args:
        checkpoint: The model as it is now.
        group: A step of the walk.
        tasks: Those of the group's layers that are compressed. An interrupted run gives all of
            them, so that it cuts a wide Hessian as the first run did.
        method: Which says how it will be factorized.

    Raises:
        CalibrationError: It holds values that are not finite.
    """
    if group.moments is None:
        return None
    together = [method.columns_together(task) for task in tasks]
    block = diagonal_block_width(
        max(task.linear.in_features for task in tasks),
        [columns for columns in together if columns is not None],
    )
    is_tied = checkpoint.spec.decoder.tied_head and any(
        task.linear.part == "embedding" for task in tasks
    )
    try:
        moments = group.moments(block)
        return InputHessian.from_moments(
            moments if method.on_device else moments.to(MAIN_MEMORY),
            method.feedback,
            lookup_share=_LOOKUP_SHARE if is_tied else 0.0,
        )
    except CalibrationError as error:
        raise CalibrationError(f"{group.names[0]}: {error}") from error


def visit_groups(
    walk: BlockWalk, wanted: Collection[str]
) -> Iterator[tuple[LinearGroup, list[str]]]:
    """The steps of a walk that hold wanted layers, until all were visited.

    For methods that change more than the layer that they measure, such as the norm before it or the
    width of its sublayer. They put in place what they find before they ask for the next step.

    Yields:
        The step, and which of its layers are wanted.
    """
    left = len(wanted)
    for step in walk if left else ():
        if isinstance(step, FinishedSublayer):
            continue
        names = [name for name in step.names if name in wanted]
        if names:
            yield step, names
        left -= len(names)
        if not left:
            return


def _load(
    store: LayerStore, names: Iterable[str], ranks: Ranks, suffix: str = ""
) -> dict[str, FinishedLayer]:
    """The layers that an earlier run finished: those that the first rank has."""
    loaded = ((name, store.load(name + suffix)) for name in names)
    found = {name: layer for name, layer in loaded if layer is not None}
    if ranks.count == 1:
        return found
    return {name: store.share(name + suffix, ranks, 0) for name in ranks.first(list(found))}
