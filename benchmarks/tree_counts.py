"""Counts of the source tree: how large it is, and how far a reader has to go through it.

```bash
python benchmarks/tree_counts.py [CHECKOUT] [--walks [NAME...]] [--path]
```

CHECKOUT is the root of any version of this repository; the default is this one. Counted are:

- loose modules: files directly in the package folder, without `__init__` and `__main__`;
- modules and lines of the package, the tests and the benchmarks;
- files that know a family: modules of the package whose code (not comments or docstrings) holds a
  name that transformers gives a submodule, or the name of a family; the patterns are those of
  `tests/models/test_families.py`, and readers in `models/families/` and the reference models are
  left out;
- getattr hooks: `getattr(stage, ...)`, `getattr(target, ...)`, `getattr(reducer, ...)`;
- lines to add a pruning score, a token reducer or a target: the modules of
  `tests/contracts/additions`, each of which adds one, without blank lines; its import and its line
  in a table come on top. The target there has no operators, so the smallest real one is counted
  too; and of families the shortest reader.

`--walks` runs three jobs and counts the functions and files that they go through
(`walk_tracer.py` says what a hop is): a calibration picture that becomes a GPTQ code, one affine
weight in the layout of ONNX Runtime and of Core ML, and a question whose first token is printed.
Of the first walk, functions of `compress` and `calibration` are what quantizes a layer. `--path`
lists the functions. Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

import numpy as np
from PIL import Image
from walk_tracer import WALKS

ROOT = Path(__file__).parents[1]
MODULES = re.compile(
    r"\b(self_attn|[qkvo]_proj|out_proj|gate_proj|up_proj|down_proj|fc[12]|layer_norm[12]"
    r"|input_layernorm|post_attention_layernorm|post_layernorm|pre_layrnorm"
    r"|patch_embedding|class_embedding|position_embedding|rotary_emb|multi_modal_projector"
    r"|modality_projection|vision_tower|language_model|lm_head)\b"
)
FAMILY = re.compile(r"^(llava|idefics3|smolvlm|clip|clip_vision_model|siglip|llama)$")
FIELDS = re.compile(r"(?<=tower\.)\w+|^(class|patch|position)_embedding$")
FREE = ("models/families/", "reference/", "testing.py")
HOOK = re.compile(r"^(stage|stages\[.*\]|target|reducer)$")
LAYERWISE = ("compress/", "calibration/")
TARGETS = ("onnx", "coreml")  # ExecuTorch converts in a child process, for minutes when followed
RECIPE = {
    "picture_to_code": "{method: gptq, rules: [{part: tower, bits: 4, group_size: 32}]}",
    "weight_to_file": "{method: rtn, rules: [{part: decoder, bits: 4, group_size: 32}]}",
}


def tokens_of(file: Path) -> list[str]:
    """Names and texts of a module's code, without comments and docstrings."""
    found, before = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
        starts_line = before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
        if token.type == tokenize.NAME or (token.type == tokenize.STRING and not starts_line):
            found.append(token.string)
        if token.type != tokenize.COMMENT:
            before = token.type
    return found


def knows_a_family(file: Path) -> bool:
    """Whether a module's code names a submodule of transformers or a family."""
    return any(
        MODULES.search(FIELDS.sub("", text))
        or (text[-1:] in "\"'" and FAMILY.match(text.strip("\"'")))
        for text in tokens_of(file)
    )


def hooks_of(file: Path) -> int:
    """Optional methods that a module looks up by name on a stage or target."""
    calls = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args
    ]
    return sum(
        node.func.id in ("getattr", "hasattr")  # type: ignore[attr-defined]
        and HOOK.match(ast.unparse(node.args[0])) is not None
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
        and not str(node.args[1].value).startswith("_")
        for node in calls
    )


def count_lines(files: list[Path], *, blank: bool = True) -> int:
    """Lines of files."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return sum(blank or bool(line.strip()) for line in lines)


def static_counts(checkout: Path) -> dict[str, int]:
    """Everything that needs no run."""
    package = checkout / "pocketvlm"
    modules = sorted(package.rglob("*.py"))
    counts = {
        "loose modules": sum(not file.name.startswith("__") for file in package.glob("*.py")),
        "modules": len(modules),
        "lines": count_lines(modules),
        "lines of tests": count_lines(list((checkout / "tests").rglob("*.py"))),
        "lines of benchmarks": count_lines(list((checkout / "benchmarks").glob("*.py"))),
        "files that know a family": sum(
            knows_a_family(file)
            for file in modules
            if not file.relative_to(package).as_posix().startswith(FREE)
        ),
        "getattr hooks": sum(map(hooks_of, modules)),
    }
    for file in sorted((checkout / "tests" / "contracts" / "additions").glob("[a-z]*.py")):
        counts[f"lines to add a {file.stem}"] = count_lines([file], blank=False)
    targets = [package / "export" / name for name in ("onnx", "coreml", "executorch")]
    counts["lines of the smallest target"] = min(
        count_lines(list(target.glob("*.py")), blank=False) for target in targets
    )
    readers = [
        file
        for file in (package / "models" / "families").glob("*.py")
        if "ModelSpec(" in file.read_text(encoding="utf-8")
    ]
    for file in sorted(readers):
        counts[f"lines to add a family: {file.stem}"] = count_lines([file], blank=False)
    return counts


def write_samples(folder: Path) -> None:
    """Two pictures with a question and an answer each."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(2):
        noise = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "question": "what is it?", "answer": "a circle"})
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "data.jsonl").write_text(text, encoding="utf-8")


def follow(checkout: Path, walk: str, work: Path, arguments: list[str]) -> dict[str, list[str]]:
    """Follows a walk through a command of a checkout; functions by route, children last."""
    hook, out = work / "hook", work / walk
    out.mkdir()
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import walk_tracer\nsys.path.pop(0)\nwalk_tracer.start()\n",
        encoding="utf-8",
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{hook}{os.pathsep}{checkout}",
        "WALK_PACKAGE": str(checkout / "pocketvlm"),
        "WALK_NAME": walk,
        "WALK_OUT": str(out),
    }
    command = [sys.executable, "-m", "pocketvlm", *arguments]
    done = subprocess.run(
        command, env=environment, cwd=checkout, check=False, capture_output=True, text=True
    )
    files = sorted(out.iterdir(), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    if not files:
        raise SystemExit(f"{walk}: ended with {done.returncode}: {done.stderr[-2000:]}")
    routes: dict[str, dict[str, None]] = {}
    for file in files:
        names = json.loads(file.read_text(encoding="utf-8"))
        routes.setdefault(file.stem.rpartition("-")[0], {}).update(dict.fromkeys(names))
    return {route: list(names) for route, names in routes.items()}


def walks(
    checkout: Path, work: Path, chosen: list[str], bundle: Path | None
) -> dict[str, list[str]]:
    """The functions of walks, by name."""
    data = work / "data"
    data.mkdir()
    write_samples(data)
    common = ["reference:pocket-llava", "--calibration", str(data), "--data", "none"]
    common += ["--no-bench", "--no-verify-source", "--threads", "1"]
    found: dict[str, list[str]] = {}
    for walk in chosen:
        if walk in RECIPE:
            recipe = work / f"{walk}.yaml"
            stage = RECIPE[walk]
            recipe.write_text(f"schema: 1\nname: walk\nstages:\n- {stage}\n", encoding="utf-8")
            targets = TARGETS if walk == "weight_to_file" else TARGETS[:1]
            words = [word for name in targets for word in ("--target", name)]
            arguments = ["compress", *common, "--recipe", str(recipe), *words]
            arguments += ["--out", str(work / f"run-{walk}")]
        else:
            bundle = bundle or make_bundle(checkout, work / "run", common)
            arguments = ["ask", str(bundle), "--image", str(data / "0.png"), "--prompt", "what?"]
            arguments += ["--runtime", "onnx"]
        for route, names in follow(checkout, walk, work, arguments).items():
            found[f"{walk} ({route})"] = names
    return found


def make_bundle(checkout: Path, run: Path, common: list[str]) -> Path:
    """A float bundle, written by the checkout without being followed."""
    command = [sys.executable, "-m", "pocketvlm", "compress", *common, "--target", TARGETS[0]]
    subprocess.run(
        [*command, "--recipe", "float", "--out", str(run)],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    return run / "bundle"


def main() -> None:
    """Prints the counts of one checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--walks", nargs="*", choices=WALKS, help="follow all walks, or these")
    parser.add_argument("--bundle", type=Path, help="an ONNX bundle that the question is asked of")
    parser.add_argument("--path", action="store_true", help="list the functions of each walk")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    counts = static_counts(checkout)
    for name, count in counts.items():
        print(f"{name:<44}{count:>8,}")
    if arguments.walks is not None:
        chosen = arguments.walks or list(WALKS)
        with tempfile.TemporaryDirectory() as work:
            found = walks(checkout, Path(work), chosen, arguments.bundle)
            for name, functions in found.items():
                files = len({function.partition(":")[0] for function in functions})
                print(f"{name:<44}{len(functions):>8,} hops through {files} files", flush=True)
                counts[f"{name} hops"], counts[f"{name} files"] = len(functions), files
                if name.startswith(WALKS[0]):
                    inside = sum(function.startswith(LAYERWISE) for function in functions)
                    print(f"{'  to quantize a layer':<44}{inside:>8,} hops")
                    counts["hops to quantize a layer"] = inside
                if arguments.path:
                    print(*(f"    {function}" for function in functions), sep="\n")
    print(json.dumps({"checkout": checkout.name, **counts}))


if __name__ == "__main__":
    main()
