"""Materials: valid files of every kind, made by the package itself; inputs are copies of them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pocketvlm.files.reader import file_sha256
from pocketvlm.files.signed_folder import sign_document

__all__ = ["Materials", "copy_folder", "make_materials", "sign_again"]

RECIPE = """schema: 1
name: fuzzed
description: what inputs are made from
calibration: {source: synthetic, samples: 2, seed: 0}
stages:
  - {method: reduce_tokens, reducer: {kind: uniform_stride}, keep: 0.5, positions: original}
  - method: rtn
    rules:
      - {part: tower, bits: 8, group_size: 32}
      - {match: '.*', blocks: [0, 1], bits: 4, group_size: 32, symmetric: true}
targets:
  - {method: onnx, accuracy_level: 0, tower_accuracy_level: 0}
expect:
  bundle_share: {max: 0.9}
"""


@dataclass(frozen=True)
class Materials:
    """Where everything valid lies.

    Attributes:
        root: The folder of all of it.
    """

    root: Path

    @property
    def recipe(self) -> Path:
        """A recipe of two stages."""
        return self.root / "recipe.yaml"

    @property
    def questions(self) -> Path:
        """A folder of pictures and a data.jsonl."""
        return self.root / "questions"

    @property
    def run(self) -> Path:
        """A finished run of the recipe."""
        return self.root / "run"

    @property
    def half(self) -> Path:
        """A run that stopped inside its last stage."""
        return self.root / "half"

    def model(self, family: str) -> Path:
        """A tiny model's folder, as stock transformers writes it."""
        return self.root / "models" / family

    def saved(self, family: str) -> Path:
        """A compressed checkpoint, as this package writes it."""
        return self.root / "saved" / family

    def bundle(self, target: str, family: str) -> Path:
        """A bundle for one target."""
        return self.root / "bundles" / f"{target}-{family}"


def make_materials(root: Path, targets: tuple[str, ...], *, runs: bool) -> Materials:
    """Makes everything; what lies there from an earlier call is kept.

    Args:
        root: The folder.
        targets: Targets that bundles are made for.
        runs: Whether a finished and an unfinished run are made.
    """
    from pocketvlm import CalibrationSet, RunContext, load_checkpoint
    from pocketvlm.pipeline.assemble import write_graphs
    from pocketvlm.recipes.load import default_target, load_recipe
    from pocketvlm.reference.random_models import tiny_config, write_random_model

    made = Materials(root)
    root.mkdir(parents=True, exist_ok=True)
    made.recipe.write_text(RECIPE, encoding="utf-8")
    if not made.questions.exists():
        _write_questions(made.questions)
    recipe = load_recipe(made.recipe)
    for family in ("llava", "smolvlm"):
        if not made.model(family).exists():
            write_random_model(tiny_config(family), made.model(family))
        if not made.saved(family).exists():
            checkpoint = load_checkpoint(made.model(family))
            calibration = CalibrationSet.synthetic(2)
            for stage in recipe.stages:
                checkpoint = stage.apply(checkpoint, calibration, RunContext(threads=1))
            checkpoint.save(made.saved(family))
    for target in targets:
        family = "smolvlm" if target == "coreml" else "llava"
        folder = made.bundle(target, family)
        if not folder.exists():
            checkpoint = load_checkpoint(made.saved(family))
            partial = folder.with_name(folder.name + ".making")
            one = default_target(target)
            if target == "coreml":
                one = replace(one, chunk=8, context=256)
            write_graphs(checkpoint, (one,), partial, "", RunContext(threads=1))
            partial.rename(folder)
    if runs and not made.half.exists():
        _make_runs(made)
    return made


def _write_questions(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index in range(3):
        name = f"{index}.png"
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(folder / name)
        lines.append({"image": name, "question": "what is it?", "answer": "noise"})
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]},
        {"role": "assistant", "content": "more noise"},
    ]
    lines[2] = {"image": "2.png", "messages": turns}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "data.jsonl").write_text(text, encoding="utf-8")


def _make_runs(made: Materials) -> None:
    from pocketvlm.context import Progress
    from pocketvlm.pipeline.job import Job

    job = Job(
        model=str(made.model("llava")), recipe=str(made.recipe), bench=False, data="none", threads=1
    )
    job.run(made.run)

    def stop_in_the_last_stage(step: Progress) -> None:
        if "rtn" in step.task and step.done > 2:
            raise KeyboardInterrupt

    partial = made.half.with_name("half.making")
    try:
        job.run(partial, on_progress=stop_in_the_last_stage)
    except KeyboardInterrupt:
        partial.rename(made.half)


def copy_folder(source: Path, target: Path) -> Path:
    """A copy whose files are hard links: an input replaces the few that it changes."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def sign_again(folder: Path, name: str, *, files: bool = True) -> None:
    """Writes true digests into a signed document, so that an input gets past their check.

    Args:
        folder: The folder.
        name: The document; anything else stays as it is.
        files: Whether the digests of files are made true as well as that of the document.
    """
    file = folder / name
    if not file.is_file():  # a pipe would wait for its writer
        return
    try:
        document = json.loads(file.read_bytes())
        signed = document["files"] if files else {}
        for listed in signed:
            if (folder / listed).is_file():
                signed[listed] = file_sha256(folder / listed)
        text = json.dumps(sign_document(document))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    file.unlink()
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
