"""The package's surface: what importing it costs, and that its names are where it says."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import pocketvlm

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pocketvlm.__path__, "pocketvlm.")
    if module.name != "pocketvlm.__main__"
)


def modules_after(code):
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(json.loads(output.stdout.splitlines()[-1]))


def test_every_public_name_is_where_the_package_says():
    for name in pocketvlm.__all__:
        assert getattr(pocketvlm, name) is not None
    assert sorted(pocketvlm.__all__) == sorted([*pocketvlm._HOMES, "__version__"])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pocketvlm.nothing


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_is_public(name):
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None)
    if public is None:
        assert module.__file__.endswith("__init__.py")
        return
    assert list(public) == sorted(public, key=lambda item: (not item.isupper(), item)) or list(
        public
    ) == sorted(public)
    for item in public:
        assert hasattr(module, item)


@pytest.mark.parametrize(
    "code",
    [
        "import pocketvlm",
        "import pocketvlm.cli",
        "import pocketvlm.runtime.conversation, pocketvlm.bundle",
        "import pocketvlm.device_bench.controller.bench, pocketvlm.reports.html",
    ],
)
def test_light_imports_load_neither_torch_nor_transformers(code):
    assert not modules_after(code) & {"torch", "transformers"}


def test_help_needs_no_heavy_module():
    loaded = modules_after(
        "from typer.testing import CliRunner\nfrom pocketvlm.cli.app import app\n"
        "assert CliRunner().invoke(app, ['compress', '--help']).exit_code == 0"
    )
    assert not loaded & {"torch", "transformers", "onnxruntime", "numpy", "yaml"}
