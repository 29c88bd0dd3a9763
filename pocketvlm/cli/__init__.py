"""The command line: parse, call the API, print. The only place that prints and draws progress."""

from __future__ import annotations

from pocketvlm.cli.app import app, main

__all__ = ["app", "main"]
