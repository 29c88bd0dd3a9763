"""Writes docs/families.md: which families run where, and what published models would weigh.

    python -m tests.contracts.families_page > docs/families.md

Every cell of the first table that says yes is a tiny model whose bundle `test_families.py` runs and
compares with the stock model, in the same run of the tests that compares this page; the others hold
the sentence by which `plan` refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pocketvlm.checkpoint.config import read_spec
from pocketvlm.errors import PocketVLMError
from pocketvlm.models.families.table import FAMILIES
from pocketvlm.pipeline.plan import plan, plan_stages
from pocketvlm.recipes.load import default_target, load_recipe
from pocketvlm.reference.random_models import TINY_MODELS, tiny_config
from pocketvlm.reference.shapes import Shape, list_shapes, load_shape
from pocketvlm.stages import PlanState
from tests.contracts.targets import CERTIFIED, INT4_STAGES, TARGETS

__all__ = ["render_page"]

_RECIPE = "int4-small"
_TITLES = {"onnx": "ONNX", "executorch": "ExecuTorch", "coreml": "Core ML"}
_INTRODUCTION = """\
# Families

A family is supported where a tiny model of it, with seeded random weights, answers as stock
transformers does: the same logits in torch, and in the bundle 32 equal greedy tokens after prompt
and pixels of the stock processor, with several pictures and in a second turn, on ONNX Runtime,
ExecuTorch and the evaluator of Core ML programs. Logits of the prompt are within 1e-4 of the
largest on each of them, with `precision: float32` for Core ML; in float16, its default, within
1e-2, and two tokens whose logits are as close are equal to it. The last column names where a
bundle of it passes its certificate after what `{recipe}` does, half of the visual tokens and int4
everywhere. On ONNX (`accuracy_level: 0`) and Core ML activations are not rounded there.
ExecuTorch's kernels always round them to int8, which adds up from block to block and costs a random
model [more than a trained one](parity.md#random-weights): its programs hold as few blocks as their
family allows, one of each kind.

This page is written by the tests that compare them (`python -m tests.contracts.families_page >
docs/families.md`). `make test` leaves out ExecuTorch programs whose operators another model's has,
and most of those in int4; `make test-exhaustive` runs them all.

What a target cannot run is refused by `plan` in one line, by what it is and not by the family's
name. A `model_type` that is not listed is refused with the nearest ones that are; a checkpoint that
needs its own code, with the repository that is converted to stock classes.
"""
_SHAPES = """\
## Published sizes

`shape:NAME` stands for a published model in every command ([command line](command_line.md)). This
is what `plan` says of them with the recipe `{recipe}`: the bundle for each target, and the visual
tokens of a photo of 640 x 480 before and after reduction. Sizes of files that others published for
phones are predicted within 10 % (`tests/pipeline/test_published_bundles.py`).
"""


class _Reasons:
    """Sentences, numbered in the order in which they are first needed."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, sentence: str) -> int:
        """The number of a sentence."""
        return self._numbers.setdefault(sentence, len(self._numbers) + 1)

    def lines(self) -> Iterator[str]:
        """All of them, as a list after a blank line."""
        if self._numbers:
            yield ""
        for sentence, number in self._numbers.items():
            yield f"{number}. {sentence}"


def render_page() -> str:
    """The page's text."""
    introduction = _INTRODUCTION.format(recipe=_RECIPE)
    parts = [introduction, *_families(), "", _SHAPES.format(recipe=_RECIPE), *_shapes()]
    return "\n".join(parts) + "\n"


def _families() -> Iterator[str]:
    reasons = _Reasons()
    titles = ("tiny model", "`model_type`", "tower", "decoder", *_TITLES.values(), "int4")
    yield _row(*titles)
    yield _row(*["---"] * len(titles))
    for name in TINY_MODELS:
        config = tiny_config(name)
        spec = read_spec(config)
        state, small = PlanState.of(spec), plan_stages(INT4_STAGES, spec)
        cells = [_cell(TARGETS[target].refuse(state), reasons) for target in _TITLES]
        certified = (_TITLES[target] for target in CERTIFIED if not TARGETS[target].refuse(small))
        types = (f"`{_type(config, part)}`" for part in ("vision_config", "text_config"))
        yield _row(f"`{name}`", _model_types(config), *types, *cells, ", ".join(certified))
    yield from reasons.lines()


def _cell(refused: tuple[str, ...], reasons: _Reasons) -> str:
    if not refused:
        return "yes"
    numbers = ", ".join(str(reasons.number(reason)) for reason in refused)
    return f"no ({numbers})"


def _shapes() -> Iterator[str]:
    reasons = _Reasons()
    yield _row("shape", "published as", "parameters", "tokens of a photo", *_TITLES.values())
    yield _row("---", "---", "---:", "---:", *["---:"] * len(_TITLES))
    for name in list_shapes():
        shape = load_shape(name)
        weights = sum(linear.out_features * linear.in_features for linear in shape.spec.linears())
        cells, tokens = [], "-"
        for target in _TITLES:
            cell, before, after = _planned(shape, target, reasons)
            cells.append(cell)
            tokens = f"{before:,} -> {after:,}" if target == "onnx" and after else tokens
        yield _row(f"`{name}`", shape.source, f"{weights / 1e6:,.0f} M", tokens, *cells)
    yield from reasons.lines()


def _planned(shape: Shape, target: str, reasons: _Reasons) -> tuple[str, int, int]:
    """Megabytes or numbers of reasons; tokens of a photo before and after reduction."""
    recipe = replace(load_recipe(_RECIPE), targets=(default_target(target),))
    try:
        made = plan(shape, recipe)
    except PocketVLMError as error:
        return f"no ({reasons.number(str(error))})", 0, 0
    if made.refused:
        numbers = ", ".join(str(reasons.number(reason)) for reason in made.refused)
        return f"no ({numbers})", 0, 0
    return f"{made.bundle_bytes / 1e6:,.0f} MB", made.photo_tokens_full, made.photo_tokens


def _model_types(config: Mapping[str, Any]) -> str:
    """The model's type, and those that are read as it is and have no tiny model."""
    own = config["model_type"]
    covered = {tiny_config(name)["model_type"] for name in TINY_MODELS} - {own}
    alike = (name for name, reader in FAMILIES.items() if reader is FAMILIES[own])
    return ", ".join(f"`{name}`" for name in alike if name not in covered)


def _type(config: Mapping[str, Any], part: str) -> str:
    return str(config[part].get("model_type", "-"))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write(render_page())
