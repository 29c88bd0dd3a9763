"""Texts of this repository are plain English, held to a list of phrases that are not.

python tests/docs/test_english.py [PREFIX...]    prints the faults of all files, or of these
"""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("pocketvlm", "tests", "benchmarks", "examples", "requirements", "docs", ".")
SUFFIXES = (".py", ".md", ".j2", ".yaml")

_THINGS = (
    "row|layer|second|token|weight|column|block|group|head|channel|picture|image|line|file|stage"
    "|target|class|question|step|call|device|model|element|entry|sample|text|minute|hour|byte|pair"
    "|matrix|chunk|tile|word|code|run|turn|answer|prompt|vector|book|place|record|person|output"
)
_COUNTED = (
    "one|two|three|bits?|bytes?|scales?|rows?|lines?|entries|values|codes?|numbers?|tokens|once"
    "|elements|samples?|columns|indices|ms|pictures|images|flags?|floats?|files?|[0-9]+"
)
WORDS = {
    r"\bbehind\b": "after",
    r"\bin front\b": "before",
    r"(?<!there\s)\b(?:is|are|was|were) no\b(?! (?:longer|more|less|worse|better|nearer)\b)": (
        "is not a, is not the (but: there is no)"
    ),
    r"\bwhoever\b": "anyone who, the caller, the reader",
    r"\bso many\b": "that many, this many, a number",
    r"\bof (?:its|their|one's) own(?=$|[.,;:!?)\"'`]| (?:and|are|as|at|before|by|could|for|from|in"
    r"|is|of|on|or|that|the|to|until|were|whatever|when|where|which|whose|with|would)\b)": (
        "its own process, a separate process"
    ),
    r"\bgoes on\b|\bgo on\b|\bwent on\b|\bgoing on (?:at|with|after)\b": "resumes, continues",
    r"\bat last\b": "finally",
    r"\banew\b": "again, re-",
    r"\bto be had\b": "available",
    r"\bas ever\b": "as usual",
    r"\bin the place of\b": "in place of",
    r"\b(?:that is|are|is) meant(?=$|[.,;:)])": "intended",
    r"\bone and the same\b": "the same",
    r"\bhalf(?: |-)blocks?\b": "sublayer",
    rf"\b(?:{_COUNTED}) an? (?:{_THINGS})\b(?! (?:costs|needs|takes|has|is|that|computes)\b)": (
        "per row"
    ),
    rf"\ba (?:row|line|file|number|bit|flag) an? (?:{_THINGS})\b": "one row per layer",
}
# English all the same.
ALLOWED = (
    r"\b(?:falls?|fell|stay(?:s|ed)?|lags?) (?:\w+ )?behind\b",
    r"\b(?:ahead or|far) behind\b",
    r"\bbehind (?:its|the) (?:\w+'s )?back\b",
    r"\bleft behind\b|\bleaves? (?:\w+ )?behind\b",
    r"\bgrows by advance behind each row\b",  # stored in every ExecuTorch program
)
# Quotations, each with the reason why it stays.
EXEMPT = {
    "tests/docs/test_english.py": "the word list",
    "pocketvlm/export/executorch/schema.py": "a sentence that programs hold, byte for byte",
}


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE)


_WORD_LIST = {_compiled(pattern): better for pattern, better in WORDS.items()}
_ALLOWED = _compiled("|".join(ALLOWED))


def _files() -> list[Path]:
    found = set()
    for folder in FOLDERS:
        for suffix in SUFFIXES:
            pattern = f"*{suffix}" if folder == "." else f"**/*{suffix}"
            found.update((ROOT / folder).glob(pattern))
    return sorted(found)


def _literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """String literals with their lines, adjacent ones joined, fields of f-strings as `{}`."""
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts.update(map(id, node.values))
            values = [
                value.value if isinstance(value, ast.Constant) else "{}" for value in node.values
            ]
            yield node.lineno, "".join(map(str, values))
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts
        ):
            yield node.lineno, node.value


def _comments(code: str) -> Iterator[tuple[int, str]]:
    """Comments with their lines; those of consecutive lines are one text."""
    start, last, text = 0, -1, ""
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, words = token.start[0], token.string.lstrip("#: ")
        if line == last + 1:
            text += "\n" + words
        else:
            yield start, text
            start, text = line, words
        last = line
    yield start, text


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """What of a file is read by people, with the lines where it begins."""
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        yield from _literals(ast.parse(content))
        yield from _comments(content)
    else:
        yield 1, content


def faults(text: str) -> Iterator[tuple[int, str]]:
    """Line within a text and what is wrong there."""
    kept = _ALLOWED.sub(lambda found: "-" * len(found.group()), text)
    for pattern, better in _WORD_LIST.items():
        for found in pattern.finditer(kept):
            words = " ".join(found.group().split())
            yield text[: found.start()].count("\n"), f"{words!r}: write {better!r}"


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@functools.cache
def faults_of(prefix: str) -> tuple[str, ...]:
    """The faults of all files whose names begin so."""
    return tuple(
        f"{_name(file)}:{start + line}: {fault}"
        for file in _files()
        if _name(file).startswith(prefix) and _name(file) not in EXEMPT
        for start, text in texts(file)
        for line, fault in faults(text)
    )


def test_texts_are_plain_english():
    wrong = faults_of("")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One scale a row.", 1),
        ("One scale\n    a row.", 1),
        ("one scale per row", 0),
        ("how many tokens an image costs", 0),
        ("It is no\n# folder, and there is no other.", 1),
        ("it is no longer there, and no worse", 0),
        ("runs in a process of its own.", 1),
        ("the norm of its own lines", 0),
        ("GPTQ stays behind VPTQ", 0),
        ("the rows behind the picture", 1),
        ("a killed run goes on at the first", 1),
    ],
)
def test_what_is_found(text: str, count: int):
    assert len(list(faults(text))) == count


if __name__ == "__main__":
    for wanted in sys.argv[1:] or [""]:
        sys.stdout.writelines(f"{fault}\n" for fault in faults_of(wanted))
