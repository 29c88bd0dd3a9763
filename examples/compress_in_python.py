"""The main job by hand: every stage is an object, every step a call.

    python examples/compress_in_python.py

Takes a shipped reference model, so that it runs as it stands; a directory of yours works the same.
"""

import sys
import tempfile
from pathlib import Path

from pocketvlm import (
    CalibrationSet,
    Conversation,
    Gptq,
    ReduceTokens,
    RunContext,
    ToOnnx,
    WeightRule,
    compress_checkpoint,
    load_checkpoint,
    load_recipe,
)
from pocketvlm.pipeline.assemble import build_bundle
from pocketvlm.reference import reference_model_path
from pocketvlm.reference.questions import generate_examples

checkpoint = load_checkpoint(reference_model_path("pocket-llava"))
calibration = CalibrationSet.from_reference(seed=0, n=8)
ctx = RunContext(seed=0, threads=1)

stages = (
    ReduceTokens(keep=0.5, positions="original"),
    Gptq(
        rules=(
            WeightRule(part="tower", bits=8, group_size=32),
            WeightRule(match=".*", bits=4, group_size=32),
        )
    ),
)
checkpoint = compress_checkpoint(checkpoint, stages, calibration, ctx)
for layer in checkpoint.history[-1].layers[:3]:
    print(layer["name"], layer["bits_per_weight"], layer["loss"], layer["loss_rtn"])

folder = Path(tempfile.mkdtemp()) / "bundle"
recipe = load_recipe("int4-balanced")
built = build_bundle(checkpoint, recipe, (ToOnnx(),), folder, tuple(calibration), ctx)
print("parity", "passed" if built.parity.passed else built.parity.failures())

example = next(generate_examples(1, 1, split="evaluation"))
answer = Conversation(built.bundle).ask(example.question, example.image)
print(example.question, "->", answer.text, f"(expected {example.answer})", file=sys.stderr)
