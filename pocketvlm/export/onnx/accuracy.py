"""What `accuracy_level` costs: the same decoder with and without rounded activations.

Level 4 rounds the input of every quantized product to int8, block by block. It is what makes
decoding fast, and on some models it flips greedy tokens (onnxruntime issue 29849), so the level
is chosen by measurement.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.signatures import cache_names, decoder_signatures
from pocketvlm.reference_graph.forward import DecoderInputs
from pocketvlm.runtime.onnx.engine import onnxruntime, require_exact_sums

__all__ = ["LevelAgreement", "agreement_of_levels"]


@dataclass(frozen=True, kw_only=True)
class LevelAgreement:
    """How far level 4 is from level 0 on the same inputs.

    Attributes:
        positions: Positions that were compared.
        same_token: Share of them at which both levels prefer the same token.
        relative_error: Largest difference of two logits over the largest logit.
    """

    positions: int
    same_token: float
    relative_error: float


def agreement_of_levels(
    checkpoint: Checkpoint, prompts: Sequence[DecoderInputs], ctx: RunContext
) -> LevelAgreement:
    """Runs prompts through the decoder at both accuracy levels, position by position.

    Args:
        checkpoint: A quantized checkpoint; without quantized layers both levels are one.
        prompts: Spliced prompts, a batch of one each.
        ctx: Threads, and where progress is told.
    """
    with tempfile.TemporaryDirectory() as name:
        logits = []
        for level in (0, 4):
            folder = Path(name) / str(level)
            ToOnnx(accuracy_level=level).export(checkpoint, folder, ctx)
            logits.append(_all_logits(folder, checkpoint, prompts, ctx.threads))
    full, rounded = logits
    return LevelAgreement(
        positions=len(full),
        same_token=float((full.argmax(-1) == rounded.argmax(-1)).mean()),
        relative_error=float(np.abs(full - rounded).max() / np.abs(full).max()),
    )


def _all_logits(
    folder: Path, checkpoint: Checkpoint, prompts: Sequence[DecoderInputs], threads: int
) -> np.ndarray:
    """Logits of every position of every prompt, [positions, vocabulary]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    require_exact_sums(options)
    session = onnxruntime.InferenceSession(
        folder / "onnx" / "decoder.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = cache_names(checkpoint.spec, "past")
    kept = "float32" if checkpoint.cache_grid is None else "int8"
    schedule = checkpoint.visual_schedule
    signatures, _ = decoder_signatures(checkpoint.spec, kept)
    rows = []
    for prompt in prompts:
        length = prompt.embeds.shape[1]
        cache = [
            np.zeros([size if isinstance(size, int) else length for size in past.shape], past.dtype)
            for past in signatures[-len(names) :]
        ]
        start, held = 0, np.zeros(0 if schedule is None else len(schedule.drops), np.int64)
        for end in _ends(checkpoint, prompt):
            feed = dict(zip(names, cache, strict=True))
            if schedule is not None:
                feed["text_rows"] = np.array([end - start - 1], np.int64)
                feed["past_stage_lengths"] = held.copy()
                visual = end - start - 1
                held += [1 + schedule.kept(drop, visual) for drop in range(1, len(held) + 1)]
            logits, *cache = session.run(
                None,
                {
                    "embeds": prompt.wide[:, start:end].numpy(),
                    "position_ids": prompt.positions_of(0)[:, start:end].numpy(),
                    "past_length": np.array([start], np.int64),
                    **feed,
                },
            )
            rows.append(logits[0, 0])
            start = end
    return np.stack(rows)


def _ends(checkpoint: Checkpoint, prompt: DecoderInputs) -> list[int]:
    """Where calls end: after each row, or after each row of text where others say nothing."""
    if checkpoint.visual_schedule is None:
        return list(range(1, prompt.embeds.shape[1] + 1))
    return [int(row) + 1 for row in (~prompt.is_visual[0]).nonzero().flatten()]
