"""The float32 export of a run's model, against which the compressed bundle is timed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.child_process import module_command, start_child
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError, ExportError
from pocketvlm.files.publish import take_place
from pocketvlm.machine import toolchain_versions
from pocketvlm.recipes.load import load_recipe

__all__ = ["make_float_baseline"]

_RECIPE = "float"


def make_float_baseline(model: Path, out: Path, ctx: RunContext) -> Path:
    """Makes the bundle `OUT/float-baseline`, unless it exists and is complete.

    A separate process makes it, so that its memory does not count as the run's; that process is a
    run inside the run's working folder.

    Args:
        model: The model's directory.
        out: The run folder, whose bundle is finished.
        ctx: Threads and progress.

    Returns:
        The bundle's folder.

    Raises:
        ExportError: The export failed; the message is from the other process.
    """
    place = out / "float-baseline"
    source = Bundle.open(out / "bundle", verify=False).manifest.source_sha256
    if _is_baseline(place, source):
        return place
    ctx.report("float32 baseline", 0, 1)
    work = out / ".work" / "float"
    command = [
        *module_command("pocketvlm"),
        *("compress", str(model), "--recipe", _RECIPE),
        *("--out", str(work), "--no-bench", "--no-verify-source", "--data", "none"),
        *("--threads", str(ctx.threads)),
        "--no-verify-source",  # the run itself has checked the model
    ]
    with start_child(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        _, said = process.communicate()
    if process.returncode != 0:
        last = said.strip().rpartition("\n")[2].removeprefix("error: ")
        raise ExportError(f"the float32 baseline could not be exported: {last}")
    take_place(work / "bundle", place)
    ctx.report("float32 baseline", 1, 1)
    return place


def _is_baseline(path: Path, source_sha256: str) -> bool:
    """Whether a complete float bundle of the same weights exists, made by the same versions."""
    try:
        manifest = Bundle.open(path).manifest
    except BundleError:
        return False
    return (
        manifest.source_sha256 == source_sha256
        and manifest.recipe_sha256 == load_recipe(_RECIPE).sha256()
        and dict(manifest.toolchain) == toolchain_versions()
    )
