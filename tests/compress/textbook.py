"""GPTQ written down a second time, straight from the paper: float64, no blocks, explicit inverses.

Nothing is shared with the package. Kept as slow and plain as possible.
"""

from __future__ import annotations

import numpy as np


def textbook_grid(group, bits, symmetric):
    """One row's group [g] to (scale, zero)."""
    top = 2**bits - 1
    low, high = min([0.0, *group]), max([0.0, *group])
    if symmetric:
        high = max(-low, high)
        low = -high
    scale = float(np.float16(np.float32((high - low) / top)))
    if scale == 0:
        scale = 1.0
    if symmetric:
        return scale, 2 ** (bits - 1)
    return scale, float(np.clip(np.round(-low / scale), 0, top))


def textbook_gptq(
    W,
    H,
    *,
    bits,
    group_size,
    symmetric,
    damping=0.01,
    order="natural",
    static_groups=False,
    keeps=None,
):
    """Codes [rows, padded], scales and zeros [rows, groups]: one column at a time, no laziness.

    What a mask `keeps` [rows, columns] drops is left out of every grid and stands for 0.
    """
    keeps = np.ones(W.shape, dtype=bool) if keeps is None else keeps
    W, H = W.astype(np.float64).copy(), H.astype(np.float64).copy()
    rows, columns = W.shape
    count = -(-columns // group_size)
    members = [
        list(range(g * group_size, min((g + 1) * group_size, columns))) for g in range(count)
    ]
    diagonal = H.diagonal().copy()
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else 1.0
    H[~alive, ~alive] = mean
    H += np.eye(columns) * damping * mean
    sequence = list(range(count))
    if order == "group_aware":
        sequence.sort(key=lambda g: -diagonal[members[g]].max())
        for group in members:
            group.sort(key=lambda c: -diagonal[c])
    permutation = [column for g in sequence for column in members[g]]
    inverse = np.linalg.inv(H[np.ix_(permutation, permutation)])
    # Upper Cholesky factor of the inverse: H^-1 = U^T U.
    U = np.linalg.cholesky(inverse).T
    scales, zeros = np.zeros((rows, count)), np.zeros((rows, count))
    codes = np.zeros((rows, columns))
    original = W.copy()
    for place, column in enumerate(permutation):
        group = column // group_size
        if place == 0 or permutation[place - 1] // group_size != group:
            source = original if static_groups else W
            for row in range(rows):
                own = [c for c in sorted(members[group]) if keeps[row, c]]
                scales[row, group], zeros[row, group] = textbook_grid(
                    source[row, own], bits, symmetric
                )
        scale, zero = scales[:, group], zeros[:, group]
        code = np.clip(np.round(W[:, column] / scale) + zero, 0, 2**bits - 1)
        stands_for = np.where(keeps[:, column], (code - zero) * scale, 0.0)
        error = (W[:, column] - stands_for) / U[place, place]
        W[:, permutation[place + 1 :]] -= np.outer(error, U[place, place + 1 :])
        codes[:, column] = code
    padded = np.repeat(zeros, group_size, axis=1)
    padded[:, :columns] = codes
    return padded, scales, zeros
