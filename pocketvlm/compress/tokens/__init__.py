"""Visual-token reduction: one file per reducer, `stage.py` has the table of them.

`Reducer`, `Ranking`, `ReducerInputs` and `TokenReducer` are what a reducer outside the package is
made of (`examples/local_contrast.py`).
"""

from pocketvlm.compress.tokens.rank.ranking import Ranking
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.compress.tokens.stage import REDUCERS, ReduceTokens
from pocketvlm.models.reducer import ReducerInputs, TokenReducer

__all__ = ["REDUCERS", "Ranking", "ReduceTokens", "Reducer", "ReducerInputs", "TokenReducer"]
