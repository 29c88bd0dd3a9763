"""What libraries find before they are imported: they report to nobody, and print nothing."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pocketvlm.environment import REPORTING, hush_imports, stop_reporting

ROOT = Path(__file__).parents[2]

# Says what the variables are at the moment when a library is looked for.
WATCH = """
import json, os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("onnxruntime", "huggingface_hub"):
            seen[name] = [os.environ.get(key) for key in KEYS]
seen = {}
sys.meta_path.insert(0, Watch())
"""

QUIET = """
import importlib, pkgutil, sys
import pocketvlm
for name in pocketvlm.__all__:
    getattr(pocketvlm, name)
for module in pkgutil.walk_packages(pocketvlm.__path__, "pocketvlm."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from pathlib import Path
from pocketvlm.export.coreml.toolkit import listen
import executorch.exir, torchao
with listen():
    pass
pocketvlm.load_checkpoint(Path(sys.argv[1]))
"""


def run_fresh(script, *arguments, **environment):
    """Runs a script in a process that inherits none of the variables."""
    inherited = {name: value for name, value in os.environ.items() if name not in REPORTING}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**inherited, **environment},
    )


@pytest.mark.parametrize(
    "code",
    [
        "from pocketvlm.runtime.onnx.engine import onnxruntime; import huggingface_hub",
        "from pocketvlm.runtime.onnx.runner import OnnxRunner; import huggingface_hub",
        # What a library does behind the package's back.
        "import pocketvlm; import onnxruntime, huggingface_hub",
    ],
)
def test_libraries_are_told_before_they_are_imported(code):
    done = run_fresh(f"KEYS = {REPORTING!r}\n{WATCH}\n{code}\nprint(json.dumps(seen))")
    seen = json.loads(done.stdout)
    assert seen == {name: ["1", "1"] for name in ("onnxruntime", "huggingface_hub")}


def test_child_processes_are_told_too():
    child = f"import os; print(*[os.environ[key] for key in {REPORTING!r}])"
    command = f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert run_fresh(f"import pocketvlm, subprocess, sys\n{command}").stdout.split() == ["1", "1"]


def test_a_session_leaves_nothing_behind(tmp_path):
    folders = {name: tmp_path / name for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    for folder in folders.values():
        folder.mkdir()
    run_fresh(
        "from pocketvlm.runtime.onnx.engine import onnxruntime\nonnxruntime.SessionOptions()",
        **{name: str(folder) for name, folder in folders.items()},
    )
    assert not [path for folder in folders.values() for path in folder.rglob("*")]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "1"),
        ("", "1"),
        ("1", "1"),
        ("true", "1"),
        ("0", "0"),
        (" No ", " No "),
        ("please", "1"),
    ],
)
def test_only_a_plain_wish_to_report_is_left_alone(before, after, monkeypatch):
    for name in REPORTING:
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
    stop_reporting()
    assert {os.environ[name] for name in REPORTING} == {after}


def test_nothing_else_imports_onnxruntime():
    """Ruff refuses the import in code; scripts inside strings and documents are seen here."""
    direct = re.compile(r"^\s*(?:import|from) onnxruntime\b", re.MULTILINE)
    told = re.compile(r"ORT_DISABLE_TELEMETRY.*?^\s*import onnxruntime\b", re.MULTILINE | re.DOTALL)
    for folder in ("pocketvlm", "tests", "benchmarks", "examples", "docs"):
        for file in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]:
            if file.name == "engine.py":
                continue
            text = file.read_text(encoding="utf-8")
            assert not direct.search(text) or told.search(text), file


def test_imports_print_nothing(tiny_paths):
    pytest.importorskip("executorch")
    done = run_fresh(QUIET, tiny_paths["smolvlm"])
    assert (done.stdout, done.stderr) == ("", "")


def test_other_messages_of_the_same_loggers_are_heard(caplog):
    hush_imports()
    logger = logging.getLogger("torchao")
    logger.warning("Failed to load /a/b/_C.abi3.so: no GPU here")
    logger.warning("this layer cannot be quantized")
    assert [record.getMessage() for record in caplog.records] == ["this layer cannot be quantized"]
    assert len(logger.filters) == 1
