"""Rotations folded into weights: outliers are spread over all channels before weights are rounded.

QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406), as far as a rotation and its inverse
can both be multiplied into weights: the stock classes compute the same function, and no runtime
multiplies by a rotation. Which weights those are is said in `rotator`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.tensors import keep_in_file
from pocketvlm.compress.quantization.transforms.folding import check_transformable
from pocketvlm.compress.quantization.transforms.rotator import Rotator
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage, StageResult
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.layout import SparseLayout
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["Rotate"]


@dataclass(frozen=True, kw_only=True)
class Rotate(Stage):
    """Rotates float weights without changing the model's function.

    Attributes:
        seed: Seed of the random signs.
        residual: Whether the decoder's residual stream is rotated (R1). It needs an untied head,
            since the final norm's weight is folded into the head and not into the embedding.
        heads: Whether every head is rotated between v and o, in decoder and tower (R2).
        tower: Whether the tower's residual stream is rotated (R3), where that is exact.
        untie_head: Whether a head that shares the embedding's weight becomes a separate matrix,
            which costs the bytes of one more table.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_weights", "quantized_cache"})

    method: Literal["rotate"] = "rotate"
    seed: int = 0
    residual: bool = True
    heads: bool = True
    tower: bool = True
    untie_head: bool = False

    def __post_init__(self) -> None:
        if not (self.residual or self.heads or self.tower):
            raise ValueError("residual, heads and tower are all false: nothing would be rotated")
        if self.untie_head and not self.residual:
            raise ValueError("untie_head only serves residual, which is false")

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        """The specification of the model after this stage, from that before it.

        Raises:
            RecipeError: The residual stream cannot be rotated: the head is tied, or what sublayers
                add to it passes norms first.
        """
        if self.residual and any(block.ffn.post_norm is not None for block in spec.decoder.blocks):
            raise RecipeError(
                "rotate: residual needs sublayers that end with a linear, and this decoder's end "
                "with a norm, whose weights no rotation passes; allowed is residual: false"
            )
        if not (self.residual and spec.decoder.tied_head):
            return spec
        if not self.untie_head:
            count = spec.decoder.vocab_size * spec.decoder.hidden_size
            raise RecipeError(
                "rotate: residual needs an untied head, and this model's shares the embedding's "
                f"weight; allowed are untie_head: true, which stores {count:,} weights more, or "
                "residual: false"
            )
        return replace(spec, decoder=replace(spec.decoder, tied_head=False))

    def plan(self, state: PlanState) -> PlanState:
        """May untie the head; every layer stays float.

        Raises:
            RecipeError: The residual stream cannot be rotated, or an earlier stage prunes a layer.
        """
        for linear, layout in state.layouts.items():
            if isinstance(layout, SparseLayout):
                raise _masked(linear)
        return state.with_spec(self.spec_after(state.spec))

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Rotates the checkpoint's weights in place; `calibration` is not looked at.

        Raises:
            RecipeError: A weight is quantized or pruned, or the head is tied and has to stay so.
        """
        check_transformable(checkpoint, self.method)
        _check_unmasked(checkpoint)
        spec = self.spec_after(checkpoint.spec)
        notes = []
        untied_bytes = 0
        if spec != checkpoint.spec:
            checkpoint = _untie(checkpoint, spec, ctx.scratch_dir)
            untied_bytes = checkpoint.form(spec.decoder.head).stored_bytes
            notes.append(
                f"the head became a separate matrix: {untied_bytes:,} bytes more in float32, "
                "before a quantizer"
            )
        work = Rotator(checkpoint, self.seed, ctx.scratch_dir)
        if self.residual:
            work.rotate_residual()
        if self.heads:
            work.rotate_heads()
        reason = work.rotate_tower() if self.tower else ""
        if reason:
            notes.append(f"tower not rotated: {reason}")
        ctx.report(self.method, 1, 1, "; ".join(notes))
        return StageResult(
            checkpoint=checkpoint,
            is_calibrated=False,
            layers=work.rows(),
            metrics={
                "residual": self.residual,
                "heads": self.heads,
                "tower": self.tower and not reason,
                "untied_head_bytes": untied_bytes,
            },
            notes=tuple(notes),
        )


def _check_unmasked(checkpoint: Checkpoint) -> None:
    for linear, form in checkpoint.forms().items():
        if isinstance(form, SparseWeight):
            raise _masked(linear)


def _masked(linear: LinearSpec) -> RecipeError:
    return RecipeError(
        f"rotate: {linear.name} is pruned, and a rotation keeps no zero; allowed is rotate before "
        "the stage that prunes, or awq, which keeps zeros"
    )


def _untie(checkpoint: Checkpoint, spec: ModelSpec, folder: Path | None) -> Checkpoint:
    """Gives the head a separate weight, equal to the embedding's."""
    form = checkpoint.form(spec.decoder.embedding)
    text = {**checkpoint.config["text_config"], "tie_word_embeddings": False}
    config = {**checkpoint.config, "tie_word_embeddings": False, "text_config": text}
    untied = replace(checkpoint, spec=spec, config=config)
    table = keep_in_file(form.dequantize(), folder)
    untied.set_form(spec.decoder.head, DenseWeight(values=table))
    return untied
