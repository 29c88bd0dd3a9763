"""Doors that others keep shut: where one of these fails, it has opened, and is ours to use."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from tests.ecosystem.libraries import needed


def test_optimum_onnx_asks_for_an_older_transformers(tmp_path):
    """Beside a transformers that pocketvlm needs, there is no `ORTModel` to load a bundle."""
    needed("optimum")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "optimum-onnx"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = message_from_bytes(archive.read(name))
    wanted = [Requirement(text) for text in told.get_all("Requires-Dist", [])]
    (transformers,) = (one for one in wanted if one.name == "transformers" and not one.marker)
    assert not transformers.specifier.contains(version("transformers"), prereleases=True)


def test_exporters_of_transformers_look_for_no_entry_point():
    """So that Core ML can be a target here, and not one that transformers finds by itself."""
    spec = find_spec("transformers.exporters")
    assert spec is not None
    assert spec.origin is not None
    sources = [path.read_text(encoding="utf-8") for path in Path(spec.origin).parent.rglob("*.py")]
    assert any("def register_backend" in source for source in sources)
    assert not any("entry_points" in source for source in sources)
