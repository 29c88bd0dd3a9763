"""A plot of `token_reduction.py`: accuracy against time to first token, as SVG."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from xml.sax.saxutils import escape

from token_rows import Row

from pocketvlm.reports.pareto import pareto_front

__all__ = ["draw_plot"]

_WIDTH, _HEIGHT = 760, 400
_LEFT, _TOP, _RIGHT, _BOTTOM = 60, 20, 20, 50
_COLOURS = ("#1b6ca8", "#2e8b57", "#c77800", "#b03a5b", "#6a4c93")
_STEPS = 5


def draw_plot(rows: Sequence[Row], baselines: Sequence[str]) -> str:
    """Dots of all rows of one model: colours are shares, baselines are hollow.

    Args:
        rows: One of them without stages: all tokens.
        baselines: Labels of those that look at no feature.

    Returns:
        The SVG document. The staircase is the Pareto front, and the dots on it are labelled.
    """
    costs = [row.ttft_ratio for row in rows]
    qualities = [100 * row.accuracy for row in rows]
    left, right = min(costs) - 0.02, max(costs) + 0.02
    bottom, top = 10 * (min(qualities) // 10), 100.0

    def place(cost: float, quality: float) -> tuple[float, float]:
        x = _LEFT + (cost - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (top - quality) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    spots = [place(*pair) for pair in zip(costs, qualities, strict=True)]
    front = pareto_front(list(zip(costs, qualities, strict=True)))
    shares = sorted({row.share for row in rows}, reverse=True)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for step in range(_STEPS + 1):
        quality = bottom + (top - bottom) * step / _STEPS
        cost = left + (right - left) * step / _STEPS
        (x, _), (_, y) = place(cost, bottom), place(left, quality)
        parts += [
            f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{quality:.0f} %</text>',
            f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{cost:.2f}</text>',
        ]
    for one, other in itertools.pairwise(spots[index] for index in front):
        path = f"M{one[0]} {one[1]} H{other[0]} V{other[1]}"
        parts.append(f'<path d="{path}" fill="none" stroke="#888" stroke-dasharray="4 3"/>')
    for row, quality, (x, y) in zip(rows, qualities, spots, strict=True):
        colour = _COLOURS[shares.index(row.share) % len(_COLOURS)]
        fill = "white" if row.label in baselines else colour
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="1.5">'
            f"<title>{escape(row.label)}, {row.keep} of {row.of}: {quality:.1f} %</title>"
            "</circle>"
        )
    for number, index in enumerate(front):
        x, y = spots[index]
        text = f"{rows[index].label} {rows[index].keep}"
        parts.append(
            f'<text x="{x}" y="{y - 8 - 12 * (number % 2)}" text-anchor="middle" font-size="10">'
            f"{escape(text)}</text>"
        )
    for number, share in enumerate(shares):
        x, y = _WIDTH - _RIGHT - 60, _HEIGHT - _BOTTOM - 14 * (len(shares) - number)
        parts += [
            f'<circle cx="{x}" cy="{y - 4}" r="4.5" fill="{_COLOURS[number % len(_COLOURS)]}"/>',
            f'<text x="{x + 10}" y="{y}">{100 * share:.0f} %</text>',
        ]
    parts += [
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 12}" text-anchor="middle">time to first token, as a '
        "share of that with all tokens</text>",
        "</svg>\n",
    ]
    return "\n".join(parts)
