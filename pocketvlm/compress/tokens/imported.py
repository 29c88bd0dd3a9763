"""A reducer of a user's own: a class outside the package that a recipe names by `module:Class`.

Python must find the module by itself, among what is installed or in PYTHONPATH: nothing that lies
beside a recipe, a checkpoint or a bundle is put on its search path. A recipe has the module
imported, for it is its user's; a saved checkpoint, which may be a stranger's, does not
(`require_trusted`). Bundles hold graphs and no names of code.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pocketvlm.compress.tokens.contract import require_contract
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.errors import CheckpointError, RecipeError
from pocketvlm.files.reader import file_sha256
from pocketvlm.models.reducer import PositionPolicy, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["TRUSTED", "Imported"]

TRUSTED = "POCKETVLM_REDUCERS"
"""Variable with the modules, parted by commas, that checkpoints may have imported."""

_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class Imported(Reducer):
    """A reducer of your own, which Python finds outside this package.

    Attributes:
        name: `module:Class`; the class is a frozen dataclass derived from `Reducer` or `Ranking` of
            `pocketvlm.compress.tokens`.
        options: Its options.
    """

    kind: Literal["imported"] = "imported"
    name: str
    options: Mapping[str, float | int | str | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name is {self.name!r}; allowed is module:Class")

    def choose(self, spec: ModelSpec) -> Reducer:
        """The user's reducer.

        Raises:
            RecipeError: There is none of this name, or it does not take the options.
        """
        kind = self._kind()
        try:
            reducer: Reducer = kind(**self.options)
            tag = reducer.kind
        except Exception as error:
            raise self._refused(f"options {dict(self.options)} are refused", error) from error
        if not isinstance(tag, str):
            raise self._refused(f"its kind must be text, not {tag!r}")
        return reducer

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of the user's reducer, once it has kept the contract on random pictures.

        Raises:
            RecipeError: It cannot be had, or does not keep the contract.
        """
        reducer = self.choose(spec)
        try:
            made = reducer.build(spec, keep=keep, positions=positions)
        except Exception as error:
            raise self._refused("does not build", error) from error
        require_contract(self.name, made, spec, keep=keep, positions=positions)
        return made

    def require_trusted(self) -> None:
        """Refuses a module that nobody but a checkpoint has named.

        Raises:
            CheckpointError: It was not imported before, and is not among `TRUSTED`.
        """
        module = self.name.partition(":")[0]
        trusted = (name.strip() for name in os.environ.get(TRUSTED, "").split(","))
        if module not in sys.modules and module not in trusted:
            raise CheckpointError(
                f"reduces visual tokens by {self.name}, which is not pocketvlm's: a checkpoint "
                f"imports no code; allow it with {TRUSTED}={module}, or in Python import {module} "
                "first"
            )

    def source_sha256(self) -> str | None:
        """Digest of the file that the class stands in; `None` where it has none."""
        file = inspect.getsourcefile(self._kind())
        return None if file is None else file_sha256(Path(file))

    def _kind(self) -> type[Any]:
        module, _, name = self.name.partition(":")
        try:
            found = import_module(module)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
                raise self._refused(
                    f"there is no module {module} among what is installed or in PYTHONPATH"
                ) from error
            raise self._refused(f"{module} cannot be imported", error) from error
        kind = getattr(found, name, None)
        if not (inspect.isclass(kind) and issubclass(kind, Reducer) and is_dataclass(kind)):
            raise self._refused(
                f"{module} has no dataclass {name} that derives from "
                "pocketvlm.compress.tokens.Reducer"
            )
        return kind

    def _refused(self, problem: str, error: BaseException | None = None) -> RecipeError:
        said = "" if error is None else f": {type(error).__name__}: {' '.join(str(error).split())}"
        return RecipeError(f"reduce_tokens: reducer {self.name}: {problem}{said}")
