"""What a module of this package imports, directly and through others, read from the source.

Nothing is imported to find out. Imports inside functions count, because the folder must be able to
run them; imports for type checkers alone do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Closure", "import_closure"]


@dataclass(frozen=True, kw_only=True)
class Closure:
    """Everything that some modules need.

    Attributes:
        files: Source files relative to the folder that holds the package, sorted.
        foreign: Top-level names of modules of other packages, sorted; the standard library's are
            left out.
    """

    files: tuple[Path, ...]
    foreign: tuple[str, ...]


def import_closure(root: Path, modules: Iterable[str]) -> Closure:
    """Follows imports from some modules of a package.

    Args:
        root: The folder that holds the package's folder.
        modules: Where to begin, by their dotted names; all are of one package.

    Raises:
        ModuleNotFoundError: A module of the package is imported and is not there.
    """
    waiting = list(modules)
    package = waiting[0].partition(".")[0]
    files: dict[str, Path] = {}
    foreign: set[str] = set()
    while waiting:
        name = waiting.pop()
        top, _, _ = name.partition(".")
        if top != package:
            foreign.add(top)
            continue
        if name in files:
            continue
        files[name] = _source(root, name)
        waiting.extend(_parents(name))
        waiting.extend(_imported(root, name, files[name]))
    return Closure(
        files=tuple(sorted(path.relative_to(root) for path in files.values())),
        foreign=tuple(sorted(foreign - sys.stdlib_module_names)),
    )


def _find(root: Path, name: str) -> Path | None:
    base = root.joinpath(*name.split("."))
    for file in (base / "__init__.py", base.with_suffix(".py")):
        if file.is_file():
            return file
    return None


def _source(root: Path, name: str) -> Path:
    file = _find(root, name)
    if file is None:
        raise ModuleNotFoundError(f"no source of {name} in {root}", name=name)
    return file


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _imported(root: Path, name: str, file: Path) -> Iterator[str]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in _run_nodes(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield base
            # A name of a package may be one of its modules.
            names = (f"{base}.{alias.name}" for alias in node.names)
            yield from (item for item in names if _find(root, item) is not None)


def _run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one but those that `if TYPE_CHECKING` leads to."""
    below = ast.iter_child_nodes(tree)
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        below = iter(tree.orelse)
    for node in below:
        yield node
        yield from _run_nodes(node)
