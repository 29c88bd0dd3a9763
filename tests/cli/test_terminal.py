"""What a stranger's bundle holds is shown by the commands, and not obeyed by the terminal."""

from __future__ import annotations

from dataclasses import replace

from typer.testing import CliRunner

from pocketvlm.bundle import Bundle, sign_bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.cli.app import app
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.printable import printable

HOSTILE = "m\x1b[2J\x9b31m\r\u202egpj.exe\x07\nparity   passed"


def hostile_bundle(tiny_paths, tmp_path, **changes):
    folder = tmp_path / "bundle"
    write_graphs(
        Checkpoint.load(tiny_paths["llava"]), (ToOnnx(),), folder, "", RunContext(threads=1)
    )
    manifest = Bundle.open(folder).manifest
    components = tuple(
        replace(c, precision={HOSTILE: HOSTILE}, notes=(HOSTILE,)) for c in manifest.components
    )
    sign_bundle(folder, replace(manifest, model=HOSTILE, components=components, **changes))
    return folder


def test_inspect_shows_names_as_they_are_written(tiny_paths, tmp_path):
    bundle = hostile_bundle(tiny_paths, tmp_path, family=HOSTILE)
    found = CliRunner().invoke(app, ["inspect", str(bundle), "--json"])
    assert found.exit_code == 0
    for text in (found.stdout, found.stderr):
        assert printable(text) == text
    assert "\nparity" not in found.stderr
    assert r"m\x1b[2J\x9b31m\r\u202egpj.exe\x07\nparity   passed" in found.stderr


def test_a_family_that_nobody_knows_is_one_error(tiny_paths, tmp_path):
    bundle = hostile_bundle(tiny_paths, tmp_path, family=HOSTILE)
    found = CliRunner().invoke(app, ["ask", str(bundle), "--prompt", "What?"])
    assert isinstance(found.exception, BundleError)
    assert "is unknown; known are llava" in str(found.exception)


def test_an_answer_is_shown_and_not_obeyed(tiny_paths, tmp_path, monkeypatch):
    bundle = hostile_bundle(tiny_paths, tmp_path)
    from pocketvlm.runtime.conversation import Conversation

    real = Conversation.ask

    def hostile(self, *arguments, on_token, **options):
        """The answer of the model, and after each piece what one could be trained to say."""
        return real(
            self, *arguments, on_token=lambda piece: on_token(piece + HOSTILE + "\té"), **options
        )

    monkeypatch.setattr(Conversation, "ask", hostile)
    said = CliRunner().invoke(
        app, ["ask", str(bundle), "--prompt", "What?", "--max-new-tokens", "3"]
    )
    assert said.exit_code == 0, said.output
    assert printable(said.stdout) == said.stdout
    assert r"m\x1b[2J\x9b31m\r\u202egpj.exe\x07" in said.stdout
    assert "\nparity   passed\té" in said.stdout  # lines and tabs are an answer's own
