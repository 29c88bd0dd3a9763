"""What a token of the tower is worth: attention that it gets, or how it stands out."""

from __future__ import annotations

from torch import Tensor

__all__ = [
    "QUERY_CHUNK",
    "cls_attention",
    "distinctness",
    "received_attention",
    "semantic_value",
]

QUERY_CHUNK = 256
"""Queries whose attention rows exist at the same time."""


def cls_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention from [CLS] to every patch, averaged over heads.

    The softmax runs over all tokens, [CLS] included; its own column is then left out, so that a
    row sums to less than one.

    Args:
        queries: Scaled queries [B, H, 1 + patches, d], [CLS] first.
        keys: Keys of the same shape.

    Returns:
        [B, patches].
    """
    row = queries[:, :, :1] @ keys.transpose(2, 3)
    return row.softmax(dim=-1).mean(dim=1)[:, 0, 1:]


def received_attention(queries: Tensor, keys: Tensor, *, chunk: int = QUERY_CHUNK) -> Tensor:
    """Attention that every token receives, averaged over queries and heads.

    Args:
        queries: Scaled queries [B, H, T, d].
        keys: Keys of the same shape.
        chunk: Queries a step; memory is B * H * chunk * T numbers instead of B * H * T * T. A
            traced graph holds one copy of the step for each chunk.

    Returns:
        [B, T]; a row sums to one.
    """
    tokens = queries.shape[2]
    transposed = keys.transpose(2, 3)
    total = None
    for start in range(0, tokens, chunk):
        rows = (queries[:, :, start : start + chunk] @ transposed).softmax(dim=-1)
        part = rows.sum(dim=2)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("there are no queries")
    return total.mean(dim=1) / tokens


def semantic_value(attention: Tensor, weight: float) -> Tensor:
    """What speaks against merging a token: the attention that it gets, `weight` for a mean one.

    Turbo (arXiv 2407.11717, eq. 3), whose constants depend on the number of tokens and whose weight
    on the block; attention is taken as a multiple of its mean instead.

    Args:
        attention: Of each token, [B, N].
        weight: In units of cosine, as likeness is.

    Returns:
        [B, N].
    """
    return attention / attention.mean(dim=-1, keepdim=True) * weight


def distinctness(features: Tensor) -> Tensor:
    """Euclidean distance of each feature from the mean feature of its picture.

    Args:
        features: [B, N, C].

    Returns:
        [B, N], not negative.
    """
    away = features - features.mean(dim=1, keepdim=True)
    return away.square().sum(dim=-1).sqrt()
