"""Rows of `real_decoder.py`, a file each, and the tables that are written from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from perplexity_rows import Judged, compare, perplexity
from real_decoder_variants import VARIANTS

from pocketvlm.compress.layerwise.scratch import find_document, keep_document
from pocketvlm.json_io import decode

__all__ = ["Row", "Setup", "Size", "read_row", "row_path", "spell_tables", "write_row"]

_HEAD = (
    "| Method | Bits | Weights | Perplexity | Each set | Times float [95 %] "
    "| Times baseline [95 %] | Seconds |\n| --- | ---: | ---: | ---: | --- | --- | --- | ---: |"
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much text there is.

    Attributes:
        pieces: That models are judged on.
        samples: Of a calibration set.
        tokens: Of a calibration sample's text.
    """

    pieces: int
    samples: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the rows of a table share.

    Attributes:
        model: Digest of the checkpoint's weights.
        text: Digest of the pieces that models are judged on.
        size: How much text there is.
        versions: Of Python and torch.
    """

    model: str
    text: str
    size: Size
    versions: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant on one calibration set.

    Attributes:
        variant: Its name.
        seed: Of the calibration set.
        setup: What it was run with.
        judged: Losses of all pieces.
        bits: That a weight of the decoder's blocks takes, scales and codebooks included.
        weights: Of those blocks, in millions, without what a mask drops.
        seconds: Processor time of compression.
    """

    variant: str
    seed: int
    setup: Setup
    judged: Judged
    bits: float
    weights: float
    seconds: float


Sets = Mapping[str, Mapping[int, Row]]
"""Rows by variant and seed."""


def row_path(work: Path, variant: str, seed: int, setup: Setup) -> Path:
    """Where a row is kept."""
    size = setup.size
    folder = work / "rows" / f"{size.pieces} pieces, {size.samples} x {size.tokens}"
    return folder / f"{variant.replace('/', ' ')}, set {seed}.json"


def read_row(path: Path) -> Row | None:
    """A row; `None` where there is none, or the file is damaged."""
    found = find_document(path)
    return None if found is None else decode(Row, found, path.name)


def write_row(path: Path, row: Row) -> None:
    """Writes a row, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keep_document(path, asdict(row))


def spell_tables(work: Path) -> Iterator[str]:
    """Lines of Markdown: a table for every section, and every setup by itself."""
    rows = [row for path in sorted((work / "rows").glob("*/*.json")) if (row := read_row(path))]
    for setup in sorted({row.setup for row in rows}, key=lambda setup: str(setup.size)):
        own = [row for row in rows if row.setup == setup]
        sets: Sets = {
            name: {row.seed: row for row in own if row.variant == name} for name in VARIANTS
        }
        yield (
            f"\nCalibration: {setup.size.samples} samples of {setup.size.tokens} tokens. Judged on "
            f"{sum(own[0].judged.tokens):,} tokens in {len(own[0].judged.tokens)} pieces. "
            f"{setup.versions}."
        )
        for section in dict.fromkeys(variant.section for variant in VARIANTS.values()):
            names = [name for name in VARIANTS if sets[name] and VARIANTS[name].section == section]
            if names:
                yield f"\n**{section}**\n"
                yield _HEAD
                yield from (_spell(sets, name) for name in names)


def _spell(sets: Sets, name: str) -> str:
    judged = [row.judged for _, row in sorted(sets[name].items())]
    row = next(iter(sets[name].values()))
    baseline = VARIANTS[name].baseline
    cells = (
        VARIANTS[name].label,
        f"{row.bits:.2f}",
        f"{row.weights:.1f} M",
        f"{perplexity(judged)[0]:.1f}",
        " / ".join(f"{perplexity([each])[0]:.1f}" for each in judged) if len(judged) > 1 else "",
        "" if name == "float" else _ratio(sets, name, "float"),
        "" if baseline is None else _ratio(sets, name, baseline),
        f"{sum(each.seconds for each in sets[name].values()) / len(judged):.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _ratio(sets: Sets, name: str, baseline: str) -> str:
    """Of perplexities, on the calibration sets that both were run on; empty if there are none."""
    ours, theirs = sets[name], sets[baseline]
    if VARIANTS[baseline].is_calibrated and VARIANTS[name].is_calibrated:
        shared = ours.keys() & theirs.keys()
        ours, theirs = ({seed: rows[seed] for seed in sorted(shared)} for rows in (ours, theirs))
    if not ours or not theirs:
        return ""
    value, low, high = compare(
        [row.judged for row in ours.values()], [row.judged for row in theirs.values()]
    )
    label = "" if baseline == "float" else f" {VARIANTS[baseline].label}"
    return f"{value:.3g} [{low:.3g}, {high:.3g}]{label}"
