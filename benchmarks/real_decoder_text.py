"""English prose that ships with Python and scikit-learn, in pieces of a fixed number of tokens.

Calibration text is that of docstrings of Python's standard library. Text that models are judged on
is the reference of the language as `help()` shows it, and what scikit-learn says of its data sets:
other documents, one of a related kind and one of another. A paragraph that stands in both kinds, or
twice, counts once, and for the first.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics
from random import Random

from transformers import PreTrainedTokenizerBase

from pocketvlm.calibration.source import CalibrationSet, Sample

__all__ = ["calibration_set", "judging_set"]

_LEAST = 150  # characters of a paragraph: shorter ones are headings and signatures
_MOST_SYMBOLS = 0.06  # share of characters that prose does not have
_QUESTION = "What does the text say?"
_DOCUMENTED = "python docstrings"


def judging_set(
    tokenizer: PreTrainedTokenizerBase, *, tokens: int, reference: int, descriptions: int
) -> CalibrationSet:
    """Text that models are judged on; `kind` of a sample says which.

    Args:
        tokenizer: Which counts.
        tokens: Of a piece.
        reference: Pieces of Python's reference.
        descriptions: Pieces of scikit-learn's descriptions.
    """
    counts = {"reference": reference, "descriptions": descriptions}
    texts = {"reference": _reference(), "descriptions": _descriptions()}
    pieces = []
    for kind, count in counts.items():
        found = list(_pieces(texts[kind], tokenizer, tokens))
        if len(found) < count:
            raise SystemExit(f"{kind}: has {len(found)} pieces of {tokens} tokens, not {count}")
        # Evenly spaced, so that neighbours in a document do not count twice.
        pieces += [(kind, found[number * len(found) // count]) for number in range(count)]
    return _samples("judging", pieces, 1)


def calibration_set(
    tokenizer: PreTrainedTokenizerBase, *, tokens: int, samples: int, seed: int, further: int = 0
) -> CalibrationSet:
    """Text to calibrate on; sets of different seeds share nothing.

    Args:
        tokenizer: Which counts.
        tokens: Of a piece.
        samples: Pieces.
        seed: Which ones.
        further: Pieces after them; they are taken from the other end of all pieces.
    """
    judged = {*_reference(), *_descriptions()}
    texts = [text for text in _docstrings() if text not in judged]
    found = list(_pieces(texts, tokenizer, tokens))
    Random(0).shuffle(found)
    if len(found) < (seed + 1) * (samples + further):
        raise SystemExit(
            f"seed {seed}: docstrings have {len(found)} pieces of {tokens} tokens, which are "
            f"{len(found) // (samples + further)} sets of {samples + further}"
        )
    chosen = found[seed * samples : (seed + 1) * samples]
    chosen += found[::-1][seed * further : (seed + 1) * further]
    return _samples(f"docstrings:{seed}", [(_DOCUMENTED, text) for text in chosen], seed)


def _samples(name: str, pieces: Sequence[tuple[str, str]], seed: int) -> CalibrationSet:
    pictures = CalibrationSet.from_reference(seed, len(pieces))
    return CalibrationSet(
        name=name,
        samples=tuple(
            Sample(
                image=picture.open_image(),
                question=_QUESTION,
                answer=text,
                kind=kind,
                where=f"{name} {number}",
            )
            for number, ((kind, text), picture) in enumerate(zip(pieces, pictures, strict=True))
        ),
    )


def _pieces(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[str]:
    """Pieces of exactly that many tokens, by themselves too."""
    ids = tokenizer(" ".join(texts), add_special_tokens=False).input_ids
    for start in range(0, len(ids) - tokens + 1, tokens):
        piece = tokenizer.decode(ids[start : start + tokens])
        # Not where the cut goes through what is one token alone.
        if len(tokenizer(piece, add_special_tokens=False).input_ids) == tokens:
            yield piece


def _reference() -> list[str]:
    return _prose(topics[name] for name in sorted(topics))


def _descriptions() -> list[str]:
    folder = files("sklearn.datasets.descr")
    found = sorted((file for file in folder.iterdir() if file.name.endswith(".rst")), key=str)
    return _prose(file.read_text(encoding="utf-8") for file in found)


def _docstrings() -> list[str]:
    """Of the modules of the standard library that are single files."""
    return _prose(
        text
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        for text in _docstrings_of(path)
    )


def _docstrings_of(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, documented):
            yield ast.get_docstring(node) or ""


def _prose(documents: Iterable[str]) -> list[str]:
    """Paragraphs without headings, code and tables, each once, on one line each."""
    paragraphs = (
        " ".join(block.split())
        for document in documents
        for block in document.split("\n\n")
        if not block.startswith((" ", "\n "))
    )
    return list(dict.fromkeys(filter(_is_prose, paragraphs)))


def _is_prose(text: str) -> bool:
    symbols = sum(not (char.isalnum() or char in " .,;:'\"()-") for char in text)
    return text[:1].isalpha() and len(text) >= _LEAST and symbols <= _MOST_SYMBOLS * len(text)
