"""A whole answer, in a fresh interpreter, without torch, transformers or anything like them."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, sys
from pathlib import Path
from pocketvlm.bundle import Bundle
from pocketvlm.runtime.conversation import Conversation

talk = Conversation(Bundle.open(Path(sys.argv[1])))
answers = [
    talk.ask("What is it?", Path(sys.argv[2]), max_new_tokens=6),
    talk.ask("And now?", max_new_tokens=6),
]
foreign = {name.partition(".")[0] for name, module in sys.modules.items()
           if "site-packages" in (getattr(module, "__file__", None) or "")}
print(json.dumps([[list(a.token_ids) for a in answers], sorted(foreign)]))
"""
# What the five packages of the runtime bring along.
COMPANIONS = {"markupsafe", "flatbuffers", "google", "packaging", "sympy", "mpmath", "coloredlogs"}


def test_answers_need_five_packages(pairs, picture, tmp_path):
    from pocketvlm.runtime.conversation import Conversation

    pair = pairs["smolvlm-consecutive"]
    file = tmp_path / "p.png"
    picture.save(file)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(pair.bundle.path), str(file)],
        capture_output=True,
        text=True,
        check=True,
    )
    answers, foreign = json.loads(done.stdout)
    assert not {"torch", "transformers", "onnx", "psutil", "pydantic"} & set(foreign)
    needed = {"numpy", "PIL", "tokenizers", "jinja2", "onnxruntime"}
    assert needed <= set(foreign)
    unknown = {name for name in foreign if not name.startswith("_")} - needed - COMPANIONS
    assert not unknown - {"pocketvlm", "distutils-precedence"}
    talk = Conversation(pair.bundle)
    assert answers[0] == list(talk.ask("What is it?", picture, max_new_tokens=6).token_ids)
    assert answers[1] == list(talk.ask("And now?", max_new_tokens=6).token_ids)
    assert not done.stderr
