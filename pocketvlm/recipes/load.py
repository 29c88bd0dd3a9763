"""Recipes: YAML in, a validated value out; the only module that knows pydantic.

Types and unknown keys are checked here, with the path of what is wrong; ranges are checked by the
stages themselves, so that a recipe and the Python API reject the same values.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pocketvlm.errors import RecipeError
from pocketvlm.files.yaml_document import plain_values, read_yaml
from pocketvlm.recipes.document import apply_overrides
from pocketvlm.recipes.former import refuse_former_spelling
from pocketvlm.recipes.stages import STAGES, TARGETS
from pocketvlm.stages import Stage, Target, check_order

__all__ = [
    "Bound",
    "CalibrationOptions",
    "Expectations",
    "Recipe",
    "default_target",
    "list_recipes",
    "load_recipe",
    "recipe_from_document",
]

_STRICT = ConfigDict(extra="forbid")
_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A measured figure must lie between these, both inclusive."""

    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, kw_only=True)
class Expectations:
    """Bounds that turn a recipe into a regression test; exit code 1 when one is broken.

    Attributes:
        bundle_share: Bytes of the largest target, with the processor's files, divided by the
            source's weight bytes: what one app ships.
        recovery: Accuracy of the bundle divided by that of the float model.
        decode_speedup: Tokens per second divided by those of the float32 ONNX baseline.
    """

    bundle_share: Bound | None = None
    recovery: Bound | None = None
    decode_speedup: Bound | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Where calibration samples come from.

    Attributes:
        source: `auto` takes reference scenes for a reference model and the declared synthetic
            fallback otherwise; or `reference`, `mosaics`, `photos`, `photos:FOLDER`, `synthetic`,
            or a folder's path.
        samples: How many are used.
        seed: Seed of generated ones.
    """

    source: str = "auto"
    samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, not {self.samples}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ordered stages, and what the result is expected to be.

    Attributes:
        name: Its name.
        description: One line for the list of recipes.
        calibration: Where calibration samples come from.
        stages: What is done, in order.
        targets: What is exported.
        expect: Bounds on the result.
    """

    name: str
    description: str = ""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    stages: tuple[Stage, ...] = ()
    targets: tuple[Target, ...] = ()
    expect: Expectations = field(default_factory=Expectations)

    def to_document(self) -> dict[str, Any]:
        """The recipe with every default written out, as YAML values."""
        return {"schema": 1, **json.loads(json.dumps(asdict(self)))}

    def sha256(self) -> str:
        """Digest of everything in the recipe that its result depends on."""
        document = self.to_document()
        relevant = {key: document[key] for key in ("calibration", "stages", "targets")}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def list_recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    folder = Path(str(resources.files("pocketvlm.recipes")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a shipped recipe by name, or a YAML file by path.

    Args:
        source: A name of `list_recipes`, or a path.
        overrides: `a.b=c` settings, where `a.b` is a path in the document such as
            `stages.0.keep` and `c` is YAML.

    Raises:
        RecipeError: There is no such recipe, or it is not valid; the message has the path.
    """
    shipped = list_recipes()
    path = shipped.get(str(source), Path(source))
    if not os.path.lexists(path):  # unlike `Path.exists`, false for a name that cannot be one
        raise RecipeError(
            f"recipe {str(source)!r} is neither a file nor one of {', '.join(shipped)}"
        )
    document = read_yaml(path, "a recipe")
    return recipe_from_document(apply_overrides(document, overrides), where=str(path))


def recipe_from_document(document: Mapping[str, Any], *, where: str) -> Recipe:
    """Validates the content of a recipe file.

    Raises:
        RecipeError: Something is wrong; the message has its path and what is allowed.
    """
    content: dict[str, Any] = plain_values(document, where)
    schema = content.pop("schema", None)
    if type(schema) is not int or schema != 1:
        raise RecipeError(f"{where}: schema: is {_shown(schema)}; allowed is 1")
    unknown = sorted(content.keys() - {f.name for f in fields(Recipe)})
    if unknown:
        allowed = ", ".join(f.name for f in fields(Recipe))
        raise RecipeError(f"{where}: {unknown[0]}: unknown key; allowed are schema, {allowed}")
    try:
        recipe = Recipe(
            name=_validate(str, content.get("name", Path(where).stem), "name"),
            description=_validate(str, content.get("description", ""), "description"),
            calibration=_validate(
                CalibrationOptions, content.get("calibration", {}), "calibration"
            ),
            stages=_validate_tagged(STAGES, content.get("stages", []), "stages"),
            targets=_validate_tagged(TARGETS, content.get("targets", []), "targets"),
            expect=_validate(Expectations, content.get("expect", {}), "expect"),
        )
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    check_order(recipe.stages)
    return recipe


def default_target(name: str) -> Target:
    """A target by its tag, with default options.

    Raises:
        RecipeError: There is no such target.
    """
    (target,) = _validate_tagged(TARGETS, [{"method": name}], "targets")
    return target


def _validate(kind: Any, value: Any, path: str) -> Any:
    _check_kinds(kind, value, path)
    try:
        # As JSON, where strict means what a recipe's author expects: a list may be a tuple and 1 a
        # float, but no text is a number and `true` is not 1.
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise RecipeError(_first_problem(error, path)) from error


def _validate_tagged(kinds: Sequence[type[Any]], value: Any, path: str) -> tuple[Any, ...]:
    """Validates a list whose items say by `method` which dataclass they are."""
    if not isinstance(value, list):
        raise RecipeError(f"{path}: must be a list, not {_shown(value)}")
    by_tag = {_tag(kind): kind for kind in kinds}
    items = []
    for index, item in enumerate(value):
        tag = item.get("method") if isinstance(item, dict) else None
        if isinstance(item, dict):
            refuse_former_spelling(item, f"{path}.{index}")
        if not isinstance(tag, str) or tag not in by_tag:
            raise RecipeError(
                f"{path}.{index}.method: is {_shown(tag)}; allowed are {', '.join(by_tag)}"
            )
        items.append(_validate(by_tag[tag], item, f"{path}.{index}"))
    return tuple(items)


def _check_kinds(hint: Any, value: Any, path: str) -> None:
    """Checks what may be one of several dataclasses as the one that its `kind` names.

    Without this, each of them would say why it is not meant.
    """
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        for item in fields(hint):
            if isinstance(value, dict) and item.name in value:
                _check_kinds(hints[item.name], value[item.name], f"{path}.{item.name}")
        return
    if get_origin(hint) in (tuple, list) and isinstance(value, list):
        for index, item in enumerate(value):
            _check_kinds(get_args(hint)[0], item, f"{path}.{index}")
        return
    kinds = {kind.kind: kind for kind in get_args(hint) if hasattr(kind, "kind")}
    if not kinds or (value is None and type(None) in get_args(hint)):
        return
    if not isinstance(value, dict):
        example = value if isinstance(value, str) and value in kinds else next(iter(kinds))
        raise RecipeError(f"{path}: is {_shown(value)}; write {{kind: {example}}}")
    tag = value.get("kind")
    if not isinstance(tag, str) or tag not in kinds:
        raise RecipeError(f"{path}.kind: is {_shown(tag)}; allowed are {', '.join(kinds)}")
    names = [item.name for item in fields(kinds[tag]) if item.name != "kind"]
    unknown = sorted(value.keys() - {"kind", *names})
    if unknown:
        allowed = f"its options are {', '.join(names)}" if names else "it has no options"
        raise RecipeError(f"{path}.{unknown[0]}: unknown key of kind {tag}; {allowed}")
    _validate(kinds[tag], value, path)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        _forbid_unknown_keys(kind)
    return TypeAdapter(kind)


def _forbid_unknown_keys(kind: type[Any]) -> None:
    # A plain attribute that pydantic reads, so that no algorithm module has to import pydantic.
    if "__pydantic_config__" in vars(kind):
        return
    kind.__pydantic_config__ = _STRICT
    for annotation in get_type_hints(kind).values():
        for inner in _dataclasses_in(annotation):
            _forbid_unknown_keys(inner)


def _dataclasses_in(annotation: Any) -> list[type[Any]]:
    if hasattr(annotation, "__dataclass_fields__"):
        return [annotation]
    return [kind for argument in get_args(annotation) for kind in _dataclasses_in(argument)]


def _tag(kind: type[Any]) -> str:
    default = kind.__dataclass_fields__["method"].default
    if default is MISSING:
        raise TypeError(f"{kind.__name__}.method needs its tag as default")
    return str(default)


def _first_problem(error: ValidationError, path: str) -> str:
    problem = error.errors(include_url=False)[0]
    location = ".".join([path, *(str(step) for step in problem["loc"])])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{location}: is missing"
    if problem["type"] == "unexpected_keyword_argument":
        message = "unknown key"
    suffix = "" if "value_error" in problem["type"] else f", not {_shown(problem.get('input'))}"
    return f"{location}: {message}{suffix}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
