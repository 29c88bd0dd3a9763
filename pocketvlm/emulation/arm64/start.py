"""Runs a module of this package in a Python that does not have it: `start.py SITE PACKAGE MODULE`.

SITE holds the packages that it imports. This package alone is taken from PACKAGE, the folder of the
process that started this one: what lies beside it there is for another processor.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

__all__ = ["main"]


def main() -> None:
    """Imports the package by its path and runs the module as a program."""
    site, package, *arguments = sys.argv[1:]
    sys.path.insert(0, site)
    spec = importlib.util.spec_from_file_location("pocketvlm", Path(package, "__init__.py"))
    if spec is None or spec.loader is None:
        sys.exit(f"{package}: holds no package")
    sys.modules["pocketvlm"] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    sys.argv[:] = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
