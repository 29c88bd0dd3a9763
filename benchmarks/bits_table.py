"""Every quantizer at every size: accuracy of answers by method and effective bits.

    python benchmarks/bits_table.py --n 500 --bits 2 2.25 --calibration-seed 0 1 2

Every weight matrix is quantized: tower, projector, decoder, table and head. Effective bits count
codes, scales, zero points and codebooks of all of them. Every row answers the same held-out
questions in torch, so differences to the float model and to GPTQ of the same bits are paired.
Beside answers stands the divergence at the tokens of right answers, KL(float || quantized) in
nats, which still tells methods apart where all of them answer as the float model does. Where there
are several calibration sets, a row is their mean, with what each of them gave. A row is printed as
soon as it is known, with the seconds that compressing took; the last line is one JSON document
with everything.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from answer_options import answer_parser, calibration_sets, held_out_questions, model_folders
from answer_rows import COLUMNS, RULE, Row
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.gradients.divergence import mean_divergence
from pocketvlm.calibration.walk.partial_forward import PartialForward
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.awq import Awq
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook.stage import Codebook, CodebookRule
from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import score_checkpoint
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage
from pocketvlm.weights.form import total_stored_bytes

# Bits of a code and most columns that may share a scale; None is one scale per row.
SCALAR = {2.0: (2, None), 2.25: (2, 128), 3.0: (3, None), 4.0: (4, None), 8.0: (8, None)}
# Bits of an index and rows that it stands for.
VECTOR = {2.0: (8, 4), 2.25: (9, 4), 3.0: (6, 2), 4.0: (8, 2), 8.0: (8, 1)}


def affine_rules(spec: ModelSpec, bits: float) -> tuple[WeightRule, ...]:
    """One rule a layer: groups are the widest that divide it, since padding would be stored."""
    width, most = SCALAR[bits]
    return tuple(
        WeightRule(
            match=re.escape(linear.name),
            bits=width,
            group_size=most
            and max(size for size in range(1, most + 1) if linear.in_features % size == 0),
        )
        for linear in spec.linears()
    )


def palette_rules(bits: float) -> tuple[CodebookRule, ...]:
    """Scalar palettes; a quarter of a bit more buys every two rows their own palette."""
    rows = 2 if bits % 1 else None
    return (CodebookRule(index_bits=int(bits), vector_length=1, rows_a_group=rows),)


def vector_rules(bits: float) -> tuple[CodebookRule, ...]:
    """Vector codebooks."""
    index_bits, length = VECTOR[bits]
    return (CodebookRule(index_bits=index_bits, vector_length=length),)


def mixed_stage(spec: ModelSpec, bits: float) -> MixedPrecision:
    """A solved mixture, no larger over all than the smallest of the uniform rows."""
    books = ((4, 4), (6, 4), (8, 4), (9, 4), (6, 2), (8, 2), (2, 1), (4, 1))
    return MixedPrecision(
        budget_bytes=min(_planned_bytes(build(spec, bits), spec) for build in UNIFORM.values()),
        options=(
            *(CodebookRule(index_bits=width, vector_length=length) for width, length in books),
            *(WeightRule(bits=width, group_size=None) for width in (4, 8)),
        ),
    )


def _planned_bytes(stages: Sequence[Stage], spec: ModelSpec) -> int:
    layouts = stages[-1].plan(PlanState.of(spec)).layouts
    return sum(
        layout.stored_bytes(linear.out_features, linear.in_features)
        for linear, layout in layouts.items()
        if layout is not None
    )


UNIFORM: dict[str, Callable[[ModelSpec, float], tuple[Stage, ...]]] = {
    "RTN": lambda spec, bits: (RoundToNearest(rules=affine_rules(spec, bits)),),
    "GPTQ": lambda spec, bits: (Gptq(rules=affine_rules(spec, bits)),),
    "AWQ + GPTQ": lambda spec, bits: (
        Awq(rules=affine_rules(spec, bits)),
        Gptq(rules=affine_rules(spec, bits)),
    ),
    "LUT k-means": lambda _, bits: (
        Codebook(rules=palette_rules(bits), error_feedback=False, tune_steps=0),
    ),
    "LUT + feedback": lambda _, bits: (Codebook(rules=palette_rules(bits)),),
    "VPTQ": lambda _, bits: (Codebook(rules=vector_rules(bits)),),
}
METHODS: dict[str, Callable[[ModelSpec, float], tuple[Stage, ...]]] = {
    **UNIFORM,
    "mixed": lambda spec, bits: (mixed_stage(spec, bits),),
}


def measure(path: Path, arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """One row a method and size of one model, the float model first."""
    samples = held_out_questions(arguments)
    sets = calibration_sets(arguments)
    ctx = RunContext(threads=arguments.threads)
    whole = Checkpoint.load(path)
    baseline = score_checkpoint(whole, samples, ctx=ctx)
    reference = _log_probabilities(whole, samples)
    row = Row.of(
        path.name,
        ("16", "float", "16.00", "0"),
        [baseline],
        floats=baseline,
        baseline=None,
        seconds=0,
    )
    print(f"\n{path.name}: n={baseline.n}, blind {baseline.blind:.1%}\n", flush=True)
    print(f"| Bits | Method | Effective bits | KL | {COLUMNS.format(baseline='GPTQ')}")
    print(f"| ---: | --- | ---: | ---: | {RULE}")
    print(row.spell(), flush=True)
    documents = [{**asdict(row), "divergences": [0.0]}]
    for bits in arguments.bits:
        gptq: Row | None = None
        for label in arguments.method:
            scores, divergences, seconds = [], [], 0.0
            for number, calibration in enumerate(sets):
                started = time.perf_counter()
                done = Checkpoint.load(path)
                # What options cost does not depend on the budget: it is measured once a set.
                own = None
                if label == "mixed":
                    own = scratch / f"{path.name}-{arguments.calibration_seed[number]}"
                    own.mkdir(parents=True, exist_ok=True)
                for stage in METHODS[label](done.spec, bits):
                    done = stage.apply(done, calibration, ctx.with_scratch(own))
                seconds += (time.perf_counter() - started) / len(sets)
                scores.append(score_checkpoint(done, samples, blind=False, ctx=ctx))
                divergences.append(mean_divergence(reference, _log_probabilities(done, samples)))
            divergence = statistics.fmean(divergences)
            keys = (f"{bits:g}", label, f"{_effective_bits(done):.2f}", f"{divergence:.2g}")
            row = Row.of(path.name, keys, scores, floats=baseline, baseline=gptq, seconds=seconds)
            gptq = row if label == "GPTQ" else gptq
            documents.append({**asdict(row), "divergences": divergences})
            print(row.spell(), flush=True)
    return documents


@torch.no_grad()
def _log_probabilities(checkpoint: Checkpoint, samples: CalibrationSet) -> Tensor:
    """Of all tokens of the right answers, float64 [tokens, vocabulary]."""
    logits = torch.cat(list(PartialForward(checkpoint, samples).logits))
    return logits.to(torch.float64).log_softmax(dim=-1)


def _effective_bits(checkpoint: Checkpoint) -> float:
    forms = list(checkpoint.forms().values())
    weights = sum(form.shape[0] * form.shape[1] for form in forms)
    return 8 * total_stored_bytes(forms) / weights


def main() -> None:
    """Entry point."""
    parser = answer_parser(__doc__, sets=1)
    parser.add_argument("--bits", type=float, nargs="+", default=sorted(SCALAR), choices=SCALAR)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--work", type=Path, help="Measured sensitivity is kept and found here.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    with TemporaryDirectory() as folder:
        scratch = arguments.work or Path(folder)
        for path in model_folders(arguments):
            rows += measure(path, arguments, scratch)
    print(json.dumps({**vars(arguments), "work": str(arguments.work), "rows": rows}))


if __name__ == "__main__":
    main()
