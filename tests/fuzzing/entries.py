"""Entries: the one table of everything of strangers that enters, and the commands that read it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzzing.binaries import mutate_protobuf, mutate_safetensors
from tests.fuzzing.damage import TEXTS, mutate_bytes, mutate_text
from tests.fuzzing.documents import mutate_document, mutate_json, mutate_lines, mutate_value
from tests.fuzzing.materials import Materials, copy_folder, sign_again
from tests.fuzzing.pictures import mutate_picture

__all__ = ["ENTRIES", "Case", "Entry"]

# A file that no input may read; recipes and pictures are named by the user and may be links.
_OUTSIDE = "/etc/passwd"

Mutation = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Case:
    """One input: what is run, and what is expected of it.

    Attributes:
        arguments: The command line.
        names: Words of which a refusal must hold one, so that it can be found.
        out: What the command writes; absent or whole after a failure.
        bundle: Whether `out` is a run, whose bundle must be absent or whole.
    """

    arguments: list[str]
    names: tuple[str, ...]
    out: Path | None = None
    bundle: bool = False


@dataclass(frozen=True)
class Entry:
    """One way in.

    Attributes:
        name: What enters.
        weight: Its share of all inputs.
        build: Writes one input into an empty folder.
        targets: Targets whose bundles it needs.
        runs: Whether it needs runs.
    """

    name: str
    weight: int
    build: Callable[[random.Random, Path, Materials], Case]
    targets: tuple[str, ...] = ()
    runs: bool = field(default=False, kw_only=True)


def _rewrite(path: Path, content: bytes) -> None:
    """Replaces a file that may be a hard link to a valid one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _mutate_file(rng: random.Random, path: Path, mutation: Mutation, *, links: bool = True) -> None:
    """Mutates a file, or puts something in its place that is none."""
    content = path.read_bytes()
    kind = rng.random()
    if kind < 0.985:
        _rewrite(path, mutation(rng, content))
        return
    path.unlink()
    action = rng.randrange(4)
    if action == 0:
        path.mkdir()
    elif action == 1 and links:
        path.symlink_to(rng.choice((_OUTSIDE, path.name, "nowhere")))
    elif action == 2:
        os.mkfifo(path)


def _ask(bundle: Path, rng: random.Random, materials: Materials, *more: str) -> list[str]:
    picture = str(materials.questions / "0.png")
    image = ["--image", picture] if rng.random() < 0.85 else []
    return [
        *("ask", str(bundle), "--prompt", "what is it?", *image, *more),
        *("--max-new-tokens", "2", "--threads", "1"),
    ]


def _eval(subject: Path, data: Path) -> list[str]:
    return ["eval", str(subject), "--data", str(data), "--n", "1", "--threads", "1"]


_YAML_WORDS = (
    *(
        "&a ",
        "*a",
        "<<: *a",
        "!!python/object:os.system ",
        "!!binary ",
        "!!set ",
        "- ",
        ": ",
        "? ",
        "{",
        "[",
    ),
    *(
        "2024-01-01",
        ".nan",
        ".inf",
        "1e400",
        "0x1F",
        "yes",
        "~",
        "---\n",
        "...\n",
        "%YAML 9\n",
        "\t",
        "|\n",
        "#",
    ),
    *(
        "method: ",
        "gptq",
        "mixed",
        "codebook",
        "distill",
        "prune",
        "sparsegpt",
        "prune_depth",
        "(a|aa)+b",
        "'",
        '"',
    ),
    *TEXTS,
)


def _recipe(rng: random.Random, folder: Path, materials: Materials) -> Case:
    import yaml

    from pocketvlm.recipes.load import list_recipes

    source = rng.choice((materials.recipe, *list_recipes().values()))
    file = folder / "recipe.yaml"
    content = source.read_bytes()
    if rng.random() < 0.5:
        document = mutate_document(rng, yaml.safe_load(content))
        text = yaml.dump(document, allow_unicode=True)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        file.write_bytes(content)
        _mutate_file(
            rng, file, lambda rng, content: mutate_text(rng, content, _YAML_WORDS), links=False
        )
    model = materials.model(rng.choice(("llava", "smolvlm")))
    if rng.random() < 0.05:
        return Case(["recipes", str(file)], (file.name,))
    target = (
        ["--target", rng.choice(("onnx", "coreml", "executorch"))] if rng.random() < 0.3 else []
    )
    return Case(
        ["plan", str(model), "--recipe", str(file), *target],
        ("recipe", "stages", "rules", "sensitivity", "folder", "bits", *_stages_and_targets()),
    )


def _setting(rng: random.Random, folder: Path, materials: Materials) -> Case:
    from pocketvlm.recipes.load import list_recipes, load_recipe

    name = rng.choice(list(list_recipes()))
    document = load_recipe(name).to_document()
    place, steps = document, []
    while isinstance(place, dict | list) and place and rng.random() < 0.9:
        step = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        steps.append(str(step))
        place = place[step]
    path = ".".join(steps)
    if rng.random() < 0.2:
        path = mutate_text(rng, path.encode()).decode("utf-8", "replace")
    value = rng.choice(
        (
            lambda: json.dumps(mutate_value(rng, place)),
            lambda: json.dumps(mutate_document(rng, {"a": place})),
            lambda: rng.choice(_YAML_WORDS) + rng.choice(_YAML_WORDS),
            lambda: str(place) + rng.choice(_YAML_WORDS),
        )
    )()
    text = f"{path}={value}" if rng.random() < 0.97 else path + value
    model = materials.model(rng.choice(("llava", "smolvlm")))
    settings = ["--set", text.replace("\0", "\\0")[:100_000]]
    return Case(
        ["plan", str(model), "--recipe", name, *settings],
        (
            *(
                "--set",
                name,
                "stages",
                "argument",
                "calibration.source",
                "sensitivity",
                "folder",
                "bits",
            ),
            *_stages_and_targets(),
        ),
    )


def _stages_and_targets() -> tuple[str, ...]:
    """What a line about an option names: the stage or the target that has it."""
    from pocketvlm.recipes.stages import STAGES, TARGETS

    stages = (f"{stage.method}:" for stage in STAGES)
    return (*stages, *(target.method for target in TARGETS))


def _bundle(
    files: tuple[tuple[str, Mutation], ...],
    target: str = "onnx",
    *,
    signed: bool = True,
    also: str = "manifest",
) -> Callable[[random.Random, Path, Materials], Case]:
    """Inputs that are bundles with one file changed."""

    def build(rng: random.Random, folder: Path, materials: Materials) -> Case:
        family = "smolvlm" if target == "coreml" else "llava"
        bundle = copy_folder(materials.bundle(target, family), folder / "bundle")
        pattern, mutation = rng.choice(files)
        file = rng.choice(sorted(path for path in bundle.glob(pattern) if path.is_file()))
        _mutate_file(rng, file, mutation)
        if rng.random() < 0.95:
            sign_again(bundle, "manifest.json", files=signed)
        names = (file.name, str(bundle), also, "the prompt")
        command = rng.random()
        if command < 0.1:
            return Case(["inspect", str(bundle)], names)
        if command < 0.15:
            return Case(["inspect", str(bundle), "--swift"], names)
        return Case(_ask(bundle, rng, materials, "--runtime", target), names)

    return build


def _model(
    files: tuple[tuple[str, Mutation], ...],
    *,
    kind: str = "models",
    plans: float = 0.0,
    also: str = "model",
) -> Callable[[random.Random, Path, Materials], Case]:
    """Inputs that are model folders with one file changed."""

    def build(rng: random.Random, folder: Path, materials: Materials) -> Case:
        family = rng.choice(("llava", "smolvlm"))
        model = copy_folder(materials.root / kind / family, folder / "model")
        name, mutation = rng.choice(files)
        _mutate_file(rng, model / name, mutation)
        if kind == "saved" and rng.random() < 0.95:
            sign_again(model, "pocketvlm.json")
        names = (name, str(model), Path(name).stem, also)
        command = rng.random()
        if command < plans:
            return Case(["plan", str(model), "--recipe", "int8-safe"], names)
        if command > 0.85:
            out = folder / "converted"
            arguments = ["convert", str(model), "--layout", "gptq", "--out", str(out)]
            return Case(arguments, (*names, "no linear layer"), out)
        return Case(_eval(model, materials.questions), names)

    return build


_TEMPLATE_WORDS = (
    *(
        "{{ messages }}",
        "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
    ),
    *(
        "{{ 'a' * 10**10 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('x') }}",
        "{% set a = [] %}",
    ),
    *(
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'x' %}",
        "{% import 'os' as o %}",
        "{{ 1/0 }}",
    ),
    *(
        "{{ messages[9].content }}",
        "{{ undefined.x }}",
        "{% break %}",
        "{% continue %}",
        "{{ [1,2]|sort(reverse='x') }}",
    ),
    *(
        "{{ '%s' % 1 }}",
        "{{ 'x'|format(1) }}",
        "{{ 'a'.center(10**9) }}",
        "{{ range(10**8)|list }}",
        "{% generation %}",
    ),
    *(
        "{{ messages|tojson(indent=10**6) }}",
        "{{ strftime_now('%Y' * 1000) }}",
        "{{ '{:>999999999}'.format(1) }}",
    ),
    *(
        "{% if",
        "{%",
        "%}",
        "{{",
        "}}",
        "{#",
        "{% endfor %}",
        "{% else %}",
        "{{ lipsum(10**6) }}",
        "{{ cycler }}",
        *TEXTS,
    ),
)


def _mutate_template(rng: random.Random, content: bytes) -> bytes:
    return mutate_text(rng, content, _TEMPLATE_WORDS)


def _either(
    first: Callable[[random.Random, Path, Materials], Case],
    second: Callable[[random.Random, Path, Materials], Case],
) -> Callable[[random.Random, Path, Materials], Case]:
    return lambda rng, folder, materials: (first if rng.random() < 0.5 else second)(
        rng, folder, materials
    )


_TOKENIZER_FILES = (
    ("tokenizer.json", mutate_json),
    ("tokenizer.json", mutate_json),
    ("tokenizer_config.json", mutate_json),
)


def _data(rng: random.Random, folder: Path, materials: Materials) -> Case:
    data = copy_folder(materials.questions, folder / "data")
    _mutate_file(rng, data / "data.jsonl", mutate_lines)
    subject = materials.bundle("onnx", "llava") if rng.random() < 0.8 else materials.model("llava")
    arguments = _eval(subject, data)
    arguments[arguments.index("--n") + 1] = "3"
    return Case(arguments, ("data.jsonl", "data", ".png"))


def _picture(rng: random.Random, folder: Path, materials: Materials) -> Case:
    names = tuple(f"picture.{end}" for end in ("png", "jpg", "gif", "tiff", "eps", "webp"))
    file = folder / rng.choice(names)
    file.write_bytes((materials.questions / "0.png").read_bytes())
    _mutate_file(rng, file, mutate_picture, links=False)
    bundle = materials.bundle("onnx", "llava")
    if rng.random() < 0.2:
        data = copy_folder(materials.questions, folder / "data")
        (data / "0.png").unlink()
        if file.exists() or file.is_symlink():
            file.rename(data / "0.png")
        return Case(_eval(bundle, data), ("0.png",))
    arguments = ["ask", str(bundle), "--prompt", "x", "--image", str(file), "--max-new-tokens", "1"]
    return Case([*arguments, "--threads", "1"], (file.name,))


def _report(rng: random.Random, folder: Path, materials: Materials) -> Case:
    run = folder / "run"
    run.mkdir()
    file = run / "report.json"
    file.write_bytes((materials.run / "report.json").read_bytes())
    _mutate_file(rng, file, mutate_json)
    names = ("report.json", str(run))
    if rng.random() < 0.5:
        pair = [str(run), str(materials.run)]
        rng.shuffle(pair)
        return Case(["compare", *pair, *(["--json"] if rng.random() < 0.3 else [])], names)
    out = folder / "page.html"
    return Case(["report", str(run), str(materials.run), "--out", str(out)], names, out)


def _working_folder(rng: random.Random, folder: Path, materials: Materials) -> Case:
    run = copy_folder(materials.half, folder / "run")
    files = sorted(path for path in run.rglob("*") if path.is_file())
    for _ in range(rng.choice((1, 1, 3))):
        file = rng.choice(files)
        if not file.is_file() or file.is_symlink():
            continue
        is_text = file.suffix in (".json", ".jsonl", ".yaml", ".jinja")
        _mutate_file(rng, file, mutate_text if is_text else mutate_bytes)
    arguments = [
        *("compress", str(materials.model("llava")), "--recipe", str(materials.recipe)),
        *("--out", str(run), "--no-bench", "--data", "none", "--threads", "1"),
    ]
    return Case(arguments, (str(run), *(file.name for file in files)), run, bundle=True)


ENTRIES: tuple[Entry, ...] = (
    Entry("recipe", 3000, _recipe),
    Entry("setting", 3000, _setting),
    Entry("manifest", 1400, _bundle((("manifest.json", mutate_json),), signed=False), ("onnx",)),
    Entry(
        "tokenizer",
        1200,
        _either(_bundle(_TOKENIZER_FILES), _model(_TOKENIZER_FILES)),
        ("onnx",),
    ),
    Entry(
        "template",
        1000,
        _either(
            _bundle((("chat_template.jinja", _mutate_template),), also="chat template"),
            _model((("chat_template.jinja", _mutate_template),), also="chat template"),
        ),
        ("onnx",),
    ),
    Entry(
        "processor",
        1200,
        _either(
            _bundle((("preprocessor_config.json", mutate_json),)),
            _model((("preprocessor_config.json", mutate_json),)),
        ),
        ("onnx",),
    ),
    Entry(
        "generation",
        800,
        _either(
            _bundle((("generation_config.json", mutate_json),)),
            _model((("generation_config.json", mutate_json),)),
        ),
        ("onnx",),
    ),
    Entry("graph", 1200, _bundle((("onnx/*.onnx", mutate_protobuf),)), ("onnx",)),
    Entry("weights", 500, _bundle((("onnx/*[!x]", mutate_bytes),)), ("onnx",)),
    Entry(
        "pte", 500, _bundle((("executorch/*.pte", mutate_bytes),), "executorch"), ("executorch",)
    ),
    Entry(
        "mlpackage",
        700,
        _bundle(
            (
                ("coreml/**/*.mlmodel", mutate_protobuf),
                ("coreml/**/weight.bin", mutate_bytes),
                ("coreml/**/Manifest.json", mutate_json),
            ),
            "coreml",
        ),
        ("coreml",),
    ),
    Entry("config.json", 2500, _model((("config.json", mutate_json),), plans=0.8)),
    Entry("safetensors", 1200, _model((("model.safetensors", mutate_safetensors),))),
    Entry("pocketvlm.json", 1000, _model((("pocketvlm.json", mutate_json),), kind="saved")),
    Entry("data.jsonl", 1200, _data, ("onnx",)),
    Entry("picture", 1500, _picture, ("onnx",)),
    Entry("report.json", 1500, _report, runs=True),
    Entry("working folder", 150, _working_folder, runs=True),
)
