"""ONNX bundles of random models at published shapes, for the benchmarks beside this file.

Speed and size do not depend on the values of dense weights, so seeded random ones are honest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.rtn import round_to_nearest
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.files.publish import replace_directory
from pocketvlm.models.selection import assign_rules
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import load_shape

__all__ = ["bundle_of", "write_bundle"]


def write_bundle(shape: str, recipe: str, folder: Path, target: ToOnnx | None = None) -> Bundle:
    """Rounds a random model to the grids of a recipe, unless `folder` holds the bundle already.

    The recipe's token reduction is left out: it changes neither bytes nor the decoder's speed.
    Pictures are cut into as few tiles as the model's processor can.

    Args:
        shape: The name of a shape.
        recipe: Name of a shipped recipe, of whose quantizing stage the rules are taken.
        folder: The bundle; the model is written to a folder beside it.
        target: How it is exported; `None` for as the recipe says.
    """
    return bundle_of(
        lambda: Checkpoint.load(
            write_shape(load_shape(shape), folder.parent / shape, is_split=False)
        ),
        recipe,
        folder,
        target,
    )


def bundle_of(
    make: Callable[[], Checkpoint], recipe: str, folder: Path, target: ToOnnx | None = None
) -> Bundle:
    """The same of any float checkpoint, which is made only where the bundle is missing."""
    if (folder / "manifest.json").is_file():
        return Bundle.open(folder, verify=False)
    checkpoint = make()
    stated = (each for each in load_recipe(recipe).targets if isinstance(each, ToOnnx))
    target = next(stated, ToOnnx()) if target is None else target
    rules = [rule for stage in load_recipe(recipe).stages for rule in getattr(stage, "rules", ())]
    for linear, rule in assign_rules(rules, checkpoint.spec.linears()).items():
        if rule is not None and rule.bits is not None:
            codes, _ = round_to_nearest(
                checkpoint.form(linear.name),
                scheme=rule.scheme,
                group_size=rule.columns_a_group(linear.in_features),
            )
            checkpoint.set_form(linear.name, codes)
    with replace_directory(folder) as aside:
        manifest = write_graphs(
            checkpoint, (target,), aside, load_recipe(recipe).sha256(), RunContext()
        )
    return Bundle(path=folder, manifest=manifest)
