"""Visual-token reduction: one file per method, `stage.py` chooses among them."""

from pocketvlm.compress.tokens.stage import SCORES, ReduceTokens

__all__ = ["SCORES", "ReduceTokens"]
