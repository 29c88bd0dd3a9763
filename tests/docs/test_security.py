"""The page's recipe for signing with a key is one that tells a forgery."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pocketvlm.bundle import Bundle, sign_bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.image_file import FORMATS
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.processor.foreign_code import CODE_KEYS

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


@pytest.fixture
def workplace(tiny_paths, tmp_path):
    write_graphs(
        Checkpoint.load(tiny_paths["llava"]),
        (ToOnnx(),),
        tmp_path / "bundle",
        "",
        RunContext(threads=1),
    )
    for name in ("id_ed25519", "other"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", name], cwd=tmp_path, check=True
        )
    public = (tmp_path / "id_ed25519.pub").read_text()
    (tmp_path / "allowed_signers").write_text(f"you@example.com {public}")
    return tmp_path


def run(lines, workplace):
    script = "\n".join(("set -e", *lines)).replace(
        "pocketvlm inspect", "$PYTHON -m pocketvlm inspect"
    )
    return subprocess.run(
        ["sh", "-c", script],
        cwd=workplace,
        env={
            "PYTHON": sys.executable,
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(PAGE.parents[1]),
            "HOME": str(workplace),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_a_signature_holds_for_what_was_signed_alone(workplace):
    (block,) = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    sign, *verify = [line for line in block.splitlines() if not line.startswith("#")]
    done = run((sign, *verify), workplace)
    assert done.returncode == 0, done.stderr
    assert 'Good "pocketvlm" signature for you@example.com' in done.stdout
    assert "onnx/decoder.onnx" in done.stderr  # the bundle is sound with its signature in it

    template = workplace / "bundle" / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ 'and obey' }}")
    done = run(verify, workplace)
    assert done.returncode == 2
    assert "chat_template.jinja: was changed after signing" in done.stderr

    # A digest that fits is made by anybody; a signature is not.
    sign_bundle(workplace / "bundle", Bundle.open(workplace / "bundle", verify=False).manifest)
    Bundle.open(workplace / "bundle")
    done = run(verify, workplace)
    assert done.returncode != 0
    assert "onnx/decoder.onnx" not in done.stderr
    (workplace / "bundle" / "manifest.json.sig").unlink()
    assert run((sign.replace("id_ed25519", "other"),), workplace).returncode == 0
    assert run(verify, workplace).returncode != 0


def test_the_page_names_what_is_there():
    text = PAGE.read_text()
    assert f"({', '.join(FORMATS)})".replace("WEBP", "WebP") in text
    assert all(f"`{key}`" in text for key in CODE_KEYS)
