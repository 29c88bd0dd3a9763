"""How many tiles rules make of pictures of common sizes, and what share of their pixels these show.

    python benchmarks/grid_rules.py

Counted from the tilings alone, for SmolVLM's processor and LLaVA-NeXT's. `shown` is BlueLM-V's
effective area of the grid over the picture's. Prints a table for each model, and one JSON line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pocketvlm.models.images.tilings import Anyres, SplitGrid
from pocketvlm.models.images.tilings.grid_rules import GridRule, RelaxedRatio, SliceCount

_NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
TILINGS: Mapping[str, SplitGrid | Anyres] = {
    "SmolVLM": SplitGrid(side=512, first=2048),
    "LLaVA-NeXT": Anyres(side=336, resolutions=_NEXT),
}
RULES: Mapping[str, GridRule | None] = {
    "own": None,
    "relaxed_ratio": RelaxedRatio(),
    "slice_count": SliceCount(),
}
SIZES = ((200, 200), (394, 390), (640, 480), (800, 300), (1024, 768), (1080, 2340), (4032, 3024))


def shown(tiling: SplitGrid | Anyres, width: int, height: int) -> float:
    """Share of a picture's pixels that the grid has room for, its ratio kept."""
    grid = tiling.grid(width, height)
    scale = min(tiling.side * grid.columns / width, tiling.side * grid.rows / height)
    return min(1.0, scale**2)


def main() -> None:
    """Entry point."""
    rows: list[dict[str, Any]] = []
    for model, own in TILINGS.items():
        print(f"{model}: tiles, the whole among them, and the share of pixels that is shown")
        print("  {:<14}".format("") + "".join(f"{name:>22}" for name in RULES))
        for size in SIZES:
            cells = []
            for name, rule in RULES.items():
                tiling = replace(own, rule=rule)
                tiles, share = tiling.grid(*size).tiles, shown(tiling, *size)
                cells.append(f"{tiles:>14} {share:>7.0%}")
                rows.append({"model": model, "size": size, "rule": name, "tiles": tiles})
                rows[-1]["shown"] = share
            print(f"  {f'{size[0]} x {size[1]}':<14}" + "".join(cells))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
