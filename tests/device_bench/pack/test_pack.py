"""The packed runner answers in a bare interpreter, from wherever it lies."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

import pocketvlm
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.pack.closure import import_closure
from pocketvlm.device_bench.pack.folder import pack_runner
from pocketvlm.device_bench.pack.requirements import distributions_of, locked_pins
from pocketvlm.device_bench.protocol import (
    PROTOCOL,
    EnvironmentJob,
    Failure,
    parse_event,
    parse_result,
    write_job,
)
from pocketvlm.device_bench.runner.measure import measure_block
from pocketvlm.device_bench.workload import Workload
from pocketvlm.errors import InputError
from pocketvlm.json_io import decode
from tests.device_bench.rig import block_job

ROOT = Path(pocketvlm.__file__).parents[1]
ODD_NAME = 'it\'s a "runner"; rm -rf $HOME `x`\n* '


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pack") / "runner"
    pack_runner(out)
    return out


@pytest.fixture(scope="module")
def bare_python(packed, tmp_path_factory) -> Path:
    """A command that is a Python with the runner's requirements and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    only = folder / "packages"
    only.mkdir()
    names = [line.partition("==")[0] for line in requirement_lines(packed)]
    for name in names:
        found = metadata.distribution(name)
        for top in {file.parts[0] for file in found.files if file.parts[0] not in ("..", ".")}:
            source = Path(found.locate_file(top))
            if source.exists() and not (only / top).exists():
                (only / top).symlink_to(source)
    start = folder / "start.py"
    start.write_text(
        "import runpy, sys; script = sys.argv[1]; sys.argv = sys.argv[1:];"
        f"sys.path.insert(0, {str(only)!r}); runpy.run_path(script, run_name='__main__')"
    )
    command = folder / "python"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{start}" "$@"\n')
    command.chmod(0o755)
    return command


def requirement_lines(runner: Path) -> list[str]:
    text = (runner / "requirements.txt").read_text()
    return [line for line in text.splitlines() if "==" in line]


def start(runner: Path, python: Path | str, *arguments: str, job: str = ""):
    return subprocess.run(
        ["sh", str(runner / "run"), *arguments],
        input=job,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PATH": os.defpath, "PYTHON": str(python)},
    )


def test_a_bare_interpreter_gives_the_same_tokens_from_an_oddly_named_folder(
    packed, bare_python, tiny_bundle, tmp_path
):
    odd = tmp_path / ODD_NAME
    shutil.copytree(packed, odd / "runner")
    shutil.copytree(tiny_bundle, odd / "bundle")
    workload = Workload(name="tiny", image_size=64, prompt_tokens=48, new_tokens=6)
    job = replace(block_job(odd / "bundle", workload), threads=1)
    done = start(odd / "runner", bare_python, job=write_job(job))
    *lines, last = done.stdout.splitlines()
    outcome = parse_result(last)
    assert done.returncode == 0, (done.stderr, outcome)
    block = decode(Block, outcome)
    here = measure_block(job, 1)
    assert block.token_ids == here.token_ids
    assert block.prompt == here.prompt
    assert all(parse_event(line) is not None for line in lines)


def test_a_job_may_come_from_a_file(packed, bare_python, tmp_path):
    file = tmp_path / "a job.json"
    file.write_text(write_job(EnvironmentJob(threads=1)))
    done = start(packed, bare_python, "--job", str(file))
    found = parse_result(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert found["threads"] == 1
    assert found["toolchain"]["pocketvlm"] == pocketvlm.__version__
    assert found["toolchain"]["torch"] is None
    for arguments in (["--job", str(tmp_path / "none")], ["--speed"]):
        done = start(packed, bare_python, *arguments)
        assert done.returncode == 2
        assert isinstance(parse_result(done.stdout.splitlines()[-1]), Failure)


def test_what_is_missing_is_said_in_the_last_line(packed, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    done = start(packed, python, job=write_job(EnvironmentJob()))
    found = parse_result(done.stdout.splitlines()[-1])
    assert done.returncode == 2
    assert isinstance(found, Failure)
    assert "No module named" in found.reason
    assert "sh install" in found.reason
    assert "Traceback" not in done.stderr


def test_any_python_3_can_read_the_script_which_speaks_this_protocol(packed):
    text = (packed / "run.py").read_text()
    ast.parse(text, feature_version=(3, 4))
    assert f'"schema": {PROTOCOL},' in text


def test_the_same_package_gives_the_same_bytes_and_times(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    pack_runner(first)
    shutil.copytree(first, again)
    (again / "lib/left_over.py").touch()
    pack_runner(again)  # replaces an older one

    def content(folder):
        return {
            path.relative_to(folder): (
                path.stat().st_mtime,
                path.read_bytes() if path.is_file() else b"",
            )
            for path in sorted(folder.rglob("*"))
        }

    assert content(again) == content(first)
    said = json.loads((first / "runner.json").read_text())["files"]
    files = {p.relative_to(first).as_posix(): p for p in first.rglob("*") if p.is_file()}
    assert said.keys() == files.keys() - {"runner.json"}
    for name, digest in said.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest


def test_nothing_of_torch_is_packed_unless_the_runtime_needs_it(packed, tmp_path):
    names = {line.partition("==")[0] for line in requirement_lines(packed)}
    assert {"numpy", "pillow", "tokenizers", "onnxruntime", "psutil", "jinja2"} <= names
    assert not names & {"torch", "transformers", "executorch", "huggingface-hub", "coremltools"}
    assert all("--hash=sha256:" in pin for pin in locked_pins(names).values())
    assert not (packed / "lib/pocketvlm/checkpoint").exists()
    found = pack_runner(tmp_path / "executorch", runtime="executorch")
    assert any(name.startswith("executorch==") for name in found.requirements)
    assert (tmp_path / "executorch/torch.txt").read_text().startswith("torch==")
    assert (tmp_path / "executorch/lib/pocketvlm/runtime/executorch/worker.py").exists()


def test_the_closure_is_computed(tmp_path):
    package = tmp_path / "shop"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "deep/__init__.py").write_text("from . import inner\n")
    (package / "deep/inner.py").write_text("from ..cheese import brie\nimport zlib, numpy.linalg\n")
    (package / "cheese.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import shop.types\nelse:\n    import yaml\n"
        "def brie():\n    from shop import late\n"
    )
    (package / "late.py").write_text("")
    (package / "types.py").write_text("import torch\n")
    found = import_closure(tmp_path, ["shop.deep.inner"])
    assert [file.as_posix() for file in found.files] == [
        "shop/__init__.py",
        "shop/cheese.py",
        "shop/deep/__init__.py",
        "shop/deep/inner.py",
        "shop/late.py",
    ]
    assert found.foreign == ("numpy", "yaml")
    with pytest.raises(ModuleNotFoundError, match=r"shop\.gone"):
        import_closure(tmp_path, ["shop.gone"])


def test_wheels_are_held_to_the_lock(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "numpy-2.4.6-cp311-none-any.whl").write_bytes(b"not what the lock names")
    with pytest.raises(InputError, match=r"no wheel of \w+==.* with a digest of the lock"):
        pack_runner(tmp_path / "out", wheels=wheels)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no such folder of wheels"):
        pack_runner(tmp_path / "out", wheels=tmp_path / "gone")


def test_a_folder_that_is_not_ours_stays(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="holds something else than a packed runner"):
        pack_runner(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        pack_runner(tmp_path / "photo.jpg")
    with pytest.raises(InputError, match="runtime is 'tflite'; allowed are onnx, executorch"):
        pack_runner(tmp_path / "new", runtime="tflite")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_requirements_follow_what_is_required():
    assert {"pillow", "markupsafe", "jinja2"} <= set(distributions_of(["PIL", "jinja2"]))
