"""Are two versions of this package the same to the byte? Every shipped recipe, both models, seed 0.

```bash
git worktree add ../before COMMIT
python benchmarks/recipe_bytes.py --before ../before --work DIR
```

Each recipe compresses each reference model by either version, in a separate process. Every file
of `checkpoint/` and `bundle/` is compared: binary files by digest, JSON documents by value, so that
a field that is new, gone or changed is named. Not compared are the bundle's `README.md` and
`report.html`, which hold timings, and digests of files that are compared themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODELS = ("pocket-llava", "pocket-smol")
UNCOMPARED = ("README.md", "report.html")
DIGESTS = ("files", "digest")
"""Keys of a signed document that hold digests: what they are of is compared itself."""


def compress(package: Path, model: str, recipe: str, out: Path, questions: int) -> float:
    """Runs a recipe by the package in a folder; seconds."""
    command = [
        *(sys.executable, "-m", "pocketvlm", "compress", f"reference:{model}"),
        *("--recipe", recipe, "--out", str(out), "--n", str(questions)),
        *("--no-bench", "--threads", "1", "--seed", "0"),
    ]
    start = time.monotonic()
    finished = subprocess.run(
        command,
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    # 1: a bound was missed on so few questions; the artifact is whole.
    if finished.returncode not in (0, 1):
        raise SystemExit(
            f"{model} {recipe}: {package} ended with {finished.returncode}\n"
            f"{finished.stderr[-2000:]}"
        )
    return time.monotonic() - start


def files_of(out: Path) -> dict[str, Path]:
    """Files of a run that have to be the same, by name."""
    return {
        str(path.relative_to(out)): path
        for folder in ("checkpoint", "bundle")
        for path in sorted((out / folder).rglob("*"))
        if path.is_file() and path.name not in UNCOMPARED
    }


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            here = f"{path}.{key}" if path else key
            if key in DIGESTS and not path:
                continue
            if key not in after:
                yield f"{here} is gone"
            elif key not in before:
                yield f"{here} is new"
            else:
                yield from differences(before[key], after[key], here)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{path}.{index}")
    elif before != after:
        yield f"{path} was {str(before)[:40]}, is {str(after)[:40]}"


def compare(before: Path, after: Path) -> tuple[int, list[str]]:
    """Files of two runs that are equal, and how the others differ."""
    old, new = files_of(before), files_of(after)
    found = [f"{name}: is gone" for name in old.keys() - new.keys()]
    found += [f"{name}: is new" for name in new.keys() - old.keys()]
    equal = 0
    for name in sorted(old.keys() & new.keys()):
        contents = old[name].read_bytes(), new[name].read_bytes()
        if contents[0] == contents[1]:
            equal += 1
        elif name.endswith(".json"):
            rows = list(differences(*map(json.loads, contents)))
            found += [f"{name}: {row}" for row in rows]
            equal += not rows
        else:
            digests = [hashlib.sha256(content).hexdigest()[:12] for content in contents]
            found.append(f"{name}: {len(contents[0])} to {len(contents[1])} bytes, {digests}")
    return equal, found


def main() -> None:
    """Prints one row per recipe and model, and the differences below it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the old version")
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--recipes", nargs="+", help="all, unless named")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--n", type=int, default=2, help="questions that are scored")
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    recipes = options.recipes or sorted(
        path.stem for path in (options.after / "pocketvlm" / "recipes").glob("*.yaml")
    )
    rows = []
    for recipe in recipes:
        for model in options.models:
            work = options.work / f"{recipe}-{model}"
            sides = {"before": options.before, "after": options.after}
            seconds = {
                side: compress(package.resolve(), model, recipe, work / side, options.n)
                for side, package in sides.items()
            }
            equal, found = compare(work / "before", work / "after")
            print(
                f"{recipe:<26} {model:<13} {equal:3d} files equal, {len(found)} differences  "
                f"{seconds['before']:6.1f} s  {seconds['after']:6.1f} s",
                flush=True,
            )
            for row in found:
                print(f"    {row}", flush=True)
            rows.append(
                {
                    "recipe": recipe,
                    "model": model,
                    "equal": equal,
                    "different": found,
                    **seconds,
                }
            )
    print(json.dumps(rows))
    sys.exit(1 if any(row["different"] for row in rows) else 0)


if __name__ == "__main__":
    main()
