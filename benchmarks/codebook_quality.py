"""Codebooks beside scalar GPTQ at 2 bits: accuracy of answers, with the table at 2 and at 4 bits.

    python benchmarks/codebook_quality.py --n 500

Every weight matrix is quantized: tower, projector, decoder and the tied table. All rows answer the
same held-out questions in torch. Effective bits count indices, tables, scales and zero points; a
table that layers share counts once. Prints one line per row, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import re

import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook.stage import Codebook, CodebookRule
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import score_checkpoint
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference import REFERENCE_MODELS, reference_model_path
from pocketvlm.stages import Stage
from pocketvlm.weights.form import total_stored_bytes


def stages_for(spec: ModelSpec, table_bits: int) -> dict[str, Stage]:
    """What is compared, by label."""
    scalar = tuple(
        WeightRule(
            match=re.escape(linear.name),
            bits=table_bits if linear.part == "embedding" else 2,
            group_size=linear.in_features,
        )
        for linear in spec.linears()
    )
    table = CodebookRule(part="embedding", index_bits=table_bits, vector_length=1)
    vectors = CodebookRule(part="embedding", index_bits=8, vector_length=8 // table_bits)
    return {
        "GPTQ, one scale per row": Gptq(rules=scalar),
        "LUT": Codebook(rules=(table, CodebookRule(index_bits=2, vector_length=1))),
        "VPTQ, vectors of 4": Codebook(rules=(vectors, CodebookRule(index_bits=8))),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1, help="Seed of the held-out questions.")
    parser.add_argument("--samples", type=int, default=128, help="Calibration samples.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    questions = CalibrationSet.from_reference(arguments.seed, arguments.n, split="evaluation")
    calibration = CalibrationSet.from_reference(0, arguments.samples)
    ctx = RunContext(threads=arguments.threads)
    rows = []
    for name in REFERENCE_MODELS:
        path = reference_model_path(name)
        for table_bits in (2, 4):
            for label, stage in stages_for(Checkpoint.load(path).spec, table_bits).items():
                done = stage.apply(Checkpoint.load(path), calibration, ctx)
                score = score_checkpoint(done, questions, blind=False, ctx=ctx)
                forms = {id(form): form for form in done.forms().values()}.values()
                weights = sum(form.shape[0] * form.shape[1] for form in forms)
                bits = 8 * total_stored_bytes(forms) / weights
                print(
                    f"{name:<13} table {table_bits} bits  {label:<20} {bits:.2f} bits  "
                    f"{score.accuracy:.1%} [{score.interval_low:.1%}, {score.interval_high:.1%}]",
                    flush=True,
                )
                rows.append(
                    {
                        "model": name,
                        "table_bits": table_bits,
                        "method": label,
                        "bits_per_weight": bits,
                        "n": score.n,
                        "accuracy": score.accuracy,
                        "interval": [score.interval_low, score.interval_high],
                    }
                )
    print(json.dumps({"seed": arguments.seed, "rows": rows}))


if __name__ == "__main__":
    main()
