"""What each visual-token reduction costs and saves, answered and timed by ONNX bundles.

    python benchmarks/token_reduction.py --rows rows --n 1000
    python benchmarks/token_table.py --rows rows

For each model, every method at every share of the tokens becomes a bundle, which answers the same
held-out questions, and is timed in turns with the bundle of all tokens. What the two vision graphs
have in common runs once per tile for all methods (`shared_tower.py`), except where times are taken.
Each finished row is appended to a file of ROWS at once: a stopped run continues where it was.
`token_table.py` makes tables and plots of the rows. `--engine torch` asks the float model in torch
instead, in batches and without times, which is several times faster.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from shared_tower import SharedTower
from token_rows import ENGINES, Row, append_row, read_rows, rows_file

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import REDUCERS, ReduceTokens
from pocketvlm.compress.tokens.baseline.random_tokens import RandomTokens
from pocketvlm.compress.tokens.limit_tiles import LimitTiles
from pocketvlm.compress.tokens.merge.similar import Similar
from pocketvlm.context import RunContext
from pocketvlm.errors import PocketVLMError
from pocketvlm.evaluation.score import score_bundle, score_checkpoint
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.reducer import POSITION_POLICIES, PositionPolicy
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.run import compress_checkpoint
from pocketvlm.reference import REFERENCE_MODELS, reference_model_path
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.stages import Stage

WHOLE = "all tokens"
_TURBO = 0.75
_NO_CALIBRATION: Any = None  # these stages look at no data


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row to be: what is done, and what it is called."""

    label: str
    share: float
    stages: tuple[Stage, ...]


def reducers(kinds: Sequence[str]) -> dict[str, Any]:
    """What is compared, by label; random tokens twice, for one subset may be lucky."""
    found: dict[str, Any] = {}
    for kind in kinds:
        if kind == "random_tokens":
            found |= {f"{kind} {seed}": RandomTokens(seed=seed) for seed in (0, 1)}
        else:
            found[kind] = REDUCERS[kind]()
        if kind == "similar":
            found["similar, semantic"] = Similar(semantic_weight=_TURBO)
    return found


def methods(
    spec: ModelSpec, shares: Sequence[float], kinds: Sequence[str], positions: PositionPolicy
) -> Iterator[Method]:
    """All rows of a model, the one of all tokens first; what does not suit it is left out."""
    yield Method(label=WHOLE, share=1.0, stages=())
    if spec.tiling is not None:
        yield Method(label="whole picture alone", share=1.0, stages=(LimitTiles(max_tiles=1),))
    chosen = reducers(kinds)
    for share in shares:
        for label, reducer in chosen.items():
            stage = ReduceTokens(reducer=reducer, keep=share, positions=positions)
            try:
                stage.build(spec)
            except PocketVLMError as error:
                print(f"{label} at {share:.0%} is left out: {error}")
                continue
            yield Method(
                label=label if positions == "original" else f"{label}, {positions}",
                share=share,
                stages=(stage,),
            )


def measure(model: str, options: argparse.Namespace, work: Path) -> None:
    """Measures what the model's file of rows lacks."""
    file = rows_file(options.rows, model, options.engine)
    source = reference_model_path(model)
    pictures = REFERENCE_MODELS[model]
    samples = CalibrationSet.from_reference(
        options.seed, options.n, split="evaluation", pictures=pictures
    )
    known = {
        (row.label, row.share)
        for row in read_rows(file, seed=options.seed)
        if row.n >= options.n  # the first n questions of a seed are always the same
    }
    whole = _export(_compressed(source, ()), work / "whole")
    tower = SharedTower(whole, work)
    picture, question = work / "picture.jpg", next(iter(samples)).question
    next(iter(samples)).open_image().save(picture, quality=95)
    spec = Checkpoint.load(source).spec
    for method in methods(spec, options.share, options.kinds, options.positions):
        if (method.label, method.share) in known:
            continue
        started = time.perf_counter()
        checkpoint = _compressed(source, method.stages)
        asks: dict[str, Any] = {
            "blind": not method.stages,
            "ctx": RunContext(threads=options.threads),
        }
        if options.engine == "torch":
            score, times = score_checkpoint(checkpoint, samples, **asks), {}
        else:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                bundle = _export(checkpoint, Path(folder))
                score = score_bundle(bundle, samples, engines={"onnx": tower.open}, **asks)
                times = time_beside(whole, bundle, picture, question, options)
        row = Row(
            model=model,
            label=method.label,
            share=method.share,
            stages=tuple(asdict(stage) for stage in method.stages),  # type: ignore[call-overload]
            keep=spec.visual_tokens if checkpoint.reducer is None else checkpoint.reducer.keep,
            of=spec.visual_tokens,
            seed=options.seed,
            n=score.n,
            credits=score.credits,
            kinds=tuple(sample.kind for sample in samples),
            blind=score.blind,
            seconds=time.perf_counter() - started,
            **times,
        )
        append_row(file, row)
        ratio = f"ttft {row.ttft_ratio:.2f}  " if times else ""
        print(
            f"{model}  {method.label:<22}{row.keep:>3}  {score.accuracy:.1%}  "
            f"{ratio}{row.seconds:.0f} s",
            flush=True,
        )


def time_beside(
    whole: Bundle, bundle: Bundle, picture: Path, question: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Times to first tokens of two bundles in turns: the second's, and its share of the first's."""
    runners = [OnnxRunner(each, threads=options.threads) for each in (whole, bundle)]
    conversations = [
        Conversation(each, runner=runner)
        for each, runner in zip((whole, bundle), runners, strict=True)
    ]
    found: dict[str, list[float]] = {name: [] for name in ("ttft", "whole", "vision", "prefill")}
    rows = 0
    for number in range(options.rounds + options.warm_ups):
        taken = []
        # Whichever of the two is second has a warmer picture: they change places.
        order = (0, 1) if number % 2 else (1, 0)
        for which in order:
            conversations[which].reset()
            start = time.perf_counter()
            answer = conversations[which].ask(question, picture, max_new_tokens=1)
            taken.append((which, (time.perf_counter() - start) * 1e3, answer.timings))
        if number < options.warm_ups:
            continue
        (_, base, _), (_, ours, timings) = sorted(taken, key=lambda one: one[0])
        found["ttft"].append(ours)
        found["whole"].append(base)
        found["vision"].append(timings.vision_ms)
        found["prefill"].append(timings.prefill_ms)
        rows = timings.prompt_tokens
    return {
        "ttft_user_ms": tuple(found["ttft"]),
        "whole_ttft_user_ms": tuple(found["whole"]),
        "vision_ms": tuple(found["vision"]),
        "prefill_ms": tuple(found["prefill"]),
        "prompt_rows": rows,
        "cache_bytes": runners[1].held_bytes,
    }


def _compressed(source: Path, stages: Sequence[Stage]) -> Checkpoint:
    return compress_checkpoint(Checkpoint.load(source), stages, _NO_CALIBRATION, RunContext())


def _export(checkpoint: Checkpoint, folder: Path) -> Bundle:
    folder.mkdir(exist_ok=True)
    manifest = write_graphs(checkpoint, (ToOnnx(),), folder, "", RunContext())
    return Bundle(path=folder, manifest=manifest)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, required=True, help="folder of the files of rows")
    parser.add_argument("--model", action="append", choices=REFERENCE_MODELS)
    parser.add_argument("--reducer", dest="kinds", action="append", choices=REDUCERS)
    parser.add_argument("--engine", choices=ENGINES, default="onnx")
    parser.add_argument("--positions", choices=POSITION_POLICIES, default="original")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="seed of the held-out questions")
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.5, 0.11, 0.05])
    parser.add_argument("--rounds", type=int, default=30, help="timed answers of each bundle")
    parser.add_argument("--warm-ups", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.kinds = options.kinds or [k for k in REDUCERS if k not in ("auto", "imported")]
    options.rows.mkdir(parents=True, exist_ok=True)
    for model in options.model or REFERENCE_MODELS:
        with tempfile.TemporaryDirectory() as work:
            measure(model, options, Path(work))


if __name__ == "__main__":
    main()
