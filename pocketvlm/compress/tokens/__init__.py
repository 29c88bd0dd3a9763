"""Visual-token reduction: one file per reducer, `stage.py` has the table of them."""

from pocketvlm.compress.tokens.stage import REDUCERS, ReduceTokens

__all__ = ["REDUCERS", "ReduceTokens"]
