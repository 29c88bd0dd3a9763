r"""What quantization costs: accuracy of answers by method, bits and group size.

    python benchmarks/quantization_quality.py --n 500 --bits 4 3 2 --group-size 16 32 64 128 0
    python benchmarks/quantization_quality.py --n 300 --before none awq rotate --bits 3 2
    python benchmarks/quantization_quality.py --part tower --bits 8 3 --group-size 0 \
        --quantizer gptq --pictures reference photos synthetic --arithmetic onnx

Every weight matrix is quantized: tower, projector, decoder, tables and head, or the parts that
`--part` names. `--pictures` compares what GPTQ is fitted to. Every row answers the
same held-out questions in torch, so differences are paired; a group size of 0 is one scale per row,
and a layer narrower than a group has one scale per row too. Prints a table for each model, and one
JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from answer_options import answer_parser, held_out_questions, model_folders

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.awq import Awq
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import Score, compare_scores, score_checkpoint
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference_graph.activation_rounding import Arithmetic

Stage = Awq | Gptq | Rotate | RoundToNearest
_PICTURES: dict[str, Callable[[int], CalibrationSet]] = {
    "reference": lambda samples: CalibrationSet.from_reference(0, samples),
    "photos": CalibrationSet.from_photos,
    "synthetic": CalibrationSet.synthetic,
}
ROTATIONS = {
    "rotate": Rotate(untie_head=True),
    "rotate_tied": Rotate(residual=False),  # what costs no separate table
}


def rules_for(
    spec: ModelSpec, bits: int, group_size: int, *, symmetric: bool, parts: list[str]
) -> tuple[WeightRule, ...]:
    """One rule a layer, since a group may be no wider than its layer."""
    return tuple(
        WeightRule(
            match=re.escape(linear.name),
            bits=bits,
            group_size=min(group_size or linear.in_features, linear.in_features),
            symmetric=symmetric,
        )
        for linear in spec.linears()
        if linear.part in parts
    )


def pipelines_for(
    spec: ModelSpec, bits: int, group_size: int, arguments: argparse.Namespace
) -> dict[str, tuple[Stage, ...]]:
    """What is done to the float model, by label: each quantizer after each transform."""
    pipelines: dict[str, tuple[Stage, ...]] = {}
    for before in arguments.before:
        turned = ROTATIONS[before].spec_after(spec) if before in ROTATIONS else spec
        rules = rules_for(
            turned, bits, group_size, symmetric=arguments.symmetric, parts=arguments.part
        )
        transforms: dict[str, tuple[Stage, ...]] = {
            "none": (),
            "awq": (Awq(rules=rules),),
            **{name: (stage,) for name, stage in ROTATIONS.items()},
        }
        for label, quantizer in quantizers_for(rules, arguments).items():
            full = label if before == "none" else f"{before} + {label}"
            pipelines[full] = (*transforms[before], quantizer)
    return pipelines


def quantizers_for(
    rules: tuple[WeightRule, ...], arguments: argparse.Namespace
) -> dict[str, Gptq | RoundToNearest]:
    """The methods that are compared, by label."""
    stages: dict[str, Gptq | RoundToNearest] = {}
    for grid in arguments.grid:
        suffix = "" if grid == "min_max" else f" {grid}"
        stages[f"rtn{suffix}"] = RoundToNearest(rules=rules, grid=grid)
        for order in arguments.order:
            for static in arguments.static:
                for weights in arguments.modality:
                    words = ["gptq" + suffix]
                    words += [order] if len(arguments.order) > 1 else []
                    words += ["static" if static else "fresh"] if len(arguments.static) > 1 else []
                    words += [str(weights)] if len(arguments.modality) > 1 else []
                    stages[" ".join(words)] = Gptq(
                        rules=rules,
                        grid=grid,
                        order=order,
                        static_groups=static,
                        modality_weights=weights,
                        damping=arguments.damping,
                    )
    return {label: stage for label, stage in stages.items() if stage.method in arguments.quantizer}


def measure(path: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a configuration of one model, the float model first."""
    samples = held_out_questions(arguments)
    calibrations = {name: _PICTURES[name](arguments.samples) for name in arguments.pictures}
    ctx = RunContext(threads=arguments.threads)
    whole = Checkpoint.load(path)
    baseline = score_checkpoint(whole, samples, ctx=ctx)
    print(f"\n{path.name}: float {_spell(baseline)}, blind {baseline.blind:.1%}, n={baseline.n}")
    print(f"  {'bits':>4} {'group':>5}  {'method':<28}{'bits/weight':>11}  accuracy [95 %]")
    rows = [_row(path.name, "float", None, None, baseline, baseline)]
    for bits in arguments.bits:
        for group_size in arguments.group_size:
            pipelines = pipelines_for(whole.spec, bits, group_size, arguments)
            for (method, stages), (pictures, calibration) in product(
                pipelines.items(), calibrations.items()
            ):
                label = method if len(calibrations) == 1 else f"{method}, {pictures}"
                done = Checkpoint.load(path)
                for stage in stages:
                    done = stage.apply(done, calibration, ctx)
                score = score_checkpoint(
                    done, samples, blind=False, arithmetic=arguments.arithmetic, ctx=ctx
                )
                row = _row(path.name, label, bits, group_size, score, baseline)
                forms = [done.form(linear.name) for linear in done.spec.linears()]
                stored = sum(form.stored_bytes for form in forms)
                weights = sum(form.shape[0] * form.shape[1] for form in forms)
                row["bits_per_weight"] = 8 * stored / weights
                row["weight_bytes"] = stored
                row["rounded_layers"] = done.history[-1].metrics.get("layers_rounded")
                rows.append(row)
                print(
                    f"  {bits:>4} {group_size or 'row':>5}  {label:<28}"
                    f"{row['bits_per_weight']:>11.2f}  {_spell(score)}  "
                    f"({row['points_gained'][0]:+.1f} [{row['points_gained'][1]:+.1f}, "
                    f"{row['points_gained'][2]:+.1f}])",
                    flush=True,
                )
    return rows


def _row(
    model: str,
    method: str,
    bits: int | None,
    group_size: int | None,
    score: Score,
    baseline: Score,
) -> dict[str, Any]:
    paired = compare_scores(baseline, score)
    return {
        "model": model,
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "n": score.n,
        "accuracy": score.accuracy,
        "interval": [score.interval_low, score.interval_high],
        "blind": baseline.blind,
        "points_gained": [
            100 * value for value in (paired.difference, paired.interval_low, paired.interval_high)
        ],
    }


def _spell(score: Score) -> str:
    return f"{score.accuracy:>6.1%} [{score.interval_low:.1%}, {score.interval_high:.1%}]"


def _weights(text: str) -> str | float:
    return text if text in ("uniform", "balanced") else float(text)


def main() -> None:
    """Entry point."""
    parser = answer_parser(__doc__, sets=None)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, nargs="+", default=[16, 32, 64, 128, 0])
    parser.add_argument("--quantizer", nargs="+", default=["rtn", "gptq"])
    parser.add_argument(
        "--before", nargs="+", default=["none"], choices=["none", "awq", *ROTATIONS]
    )
    parser.add_argument("--grid", nargs="+", default=["min_max"])
    parser.add_argument("--order", nargs="+", default=["group_aware"])
    parser.add_argument("--static", type=int, nargs="+", default=[0])
    parser.add_argument("--modality", type=_weights, nargs="+", default=["balanced"])
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--pictures", nargs="+", default=["reference"], choices=_PICTURES)
    parser.add_argument("--arithmetic", default="float32", choices=get_args(Arithmetic))
    parser.add_argument(
        "--part", nargs="+", default=["tower", "projector", "decoder", "embedding", "head"]
    )
    arguments = parser.parse_args()
    arguments.static = [bool(value) for value in arguments.static]
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    rows = []
    for path in model_folders(arguments):
        rows += measure(path, arguments)
    document = {"seed": arguments.seed, "seconds": time.perf_counter() - started, "rows": rows}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
