"""The loop on the documentation page runs as it stands there, and answers like the runtime."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.text import TextCodec, user_message

PAGE = Path(__file__).parents[2] / "docs" / "runtime.md"


@pytest.fixture(scope="module")
def loop():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (source,) = [block for block in blocks if block.startswith("# loop")]
    names: dict[str, object] = {}
    exec(compile(source, str(PAGE), "exec"), names)  # noqa: S102  (our own page)
    return names


def test_loop_of_the_page_answers_like_the_runtime(loop, pair, picture):
    ids = TextCodec.from_bundle(pair.bundle).encode([user_message("What is it?", 1)])
    pixels = ImagePreprocessor.from_bundle(pair.bundle).pixels(picture)
    expected = Conversation(pair.bundle).ask("What is it?", picture, max_new_tokens=12)
    found = loop["answer"](pair.bundle.path, pixels, ids, 12)
    assert found == list(expected.token_ids)


def test_first_example_of_the_page_runs(pair, picture, tmp_path, monkeypatch, capsys):
    (tmp_path / "bundle").symlink_to(pair.bundle.path)
    picture.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    source = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    exec(compile(source, str(PAGE), "exec"), {})  # noqa: S102  (our own page)
    assert len(capsys.readouterr().out.splitlines()) > 1


def test_positions_of_the_page(loop):
    text = PAGE.read_text(encoding="utf-8")
    for policy in ("original", "consecutive"):
        row = re.search(rf"\| `{policy}` \| ([^|]+)\| ([^|]+)\| ([^|]+)\| ([^|]+)\|", text)
        said = [int(number) for cell in row.groups() for number in cell.split()]
        manifest = {
            "prompt": {"image_token_id": 9},
            "visual_tokens_full": 16,
            "positions": policy,
        }
        ids = [1, 2, *[9] * 16, 3]
        _, _, positions, following = loop["place"](ids, [1, 4, 6, 11, 14], manifest)
        assert [*positions, following] == said
