"""GPTQ as one writes it from the paper with torch: float32, blocks of 128, lazy updates.

The yardstick of `benchmarks/compression_speed.py` and a second opinion on losses. Nothing is shared
with the package. Groups are whole blocks of columns, so that no grid is stale.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def hessian_of(inputs: Tensor) -> Tensor:
    """2 X^T X / tokens of inputs [tokens, columns]."""
    H = torch.zeros(inputs.shape[1], inputs.shape[1])
    for batch in inputs.split(1024):
        H += 2 * batch.T @ batch
    return H / inputs.shape[0]


def straightforward_gptq(
    weight: Tensor, H: Tensor, *, bits: int, group_size: int, damping: float = 0.01
) -> Tensor:
    """The dequantized weight [rows, columns], asymmetric groups."""
    W = weight.clone().float()
    H = H.clone()
    columns = W.shape[1]
    top = 2**bits - 1
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H += damping * H.diagonal().mean() * torch.eye(columns)
    H = torch.linalg.cholesky(H)
    H = torch.cholesky_inverse(H)
    U = torch.linalg.cholesky(H, upper=True)
    Q = torch.zeros_like(W)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        W1, Q1 = W[:, start:end].clone(), torch.zeros_like(W[:, start:end])
        E1, U1 = torch.zeros_like(W1), U[start:end, start:end]
        for i in range(end - start):
            if (start + i) % group_size == 0:
                group = W1[:, i : i + group_size]
                low = group.amin(1).clamp(max=0)
                high = group.amax(1).clamp(min=0)
                scale = ((high - low) / top).clamp(min=1e-8)
                zero = torch.round(-low / scale)
            w, d = W1[:, i], U1[i, i]
            q = torch.clamp(torch.round(w / scale) + zero, 0, top)
            q = scale * (q - zero)
            Q1[:, i] = q
            e = (w - q) / d
            W1[:, i:] -= e.unsqueeze(1).matmul(U1[i, i:].unsqueeze(0))
            E1[:, i] = e
        Q[:, start:end] = Q1
        W[:, end:] -= E1.matmul(U[start:end, end:])
    return Q
