"""Seeded orthogonal matrices that spread an outlier over all channels.

A Hadamard matrix does so perfectly: all its entries have the same magnitude. Orders 2**k come from
Sylvester's construction, orders q + 1 for a prime q = 3 mod 4 from Paley's; their Kronecker
products cover the widths of most models, 192 = 12 * 16 and 576 = 12 * 12 * 4 among them. What is
left of a width is covered by a random orthogonal factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fix_ones", "hadamard", "random_orthogonal", "random_rotation"]


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [width, width], float64: random signs, then a Hadamard matrix.

    This is the randomized Hadamard transform of QuaRot (arXiv 2404.00456, section 3). Where no
    Hadamard matrix of the width can be built here, its largest odd remainder is random orthogonal.
    """
    fixed, rest = hadamard(width)
    rotation = torch.kron(fixed, random_orthogonal(rest, generator)) if rest > 1 else fixed
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
    return signs[:, None] * rotation


def fix_ones(rotation: Tensor) -> Tensor:
    """Turns a rotation Q into one whose rows and columns each sum to one.

    Such a matrix keeps the mean of what it rotates, so it commutes with the core of a LayerNorm.
    It is Q P, where P is the reflection that brings (1, ..., 1) Q back to (1, ..., 1).
    """
    width = rotation.shape[0]
    ones = torch.full((width,), width**-0.5, dtype=rotation.dtype)
    moved = ones @ rotation
    normal = moved - ones
    length = normal.norm()
    if float(length) < 1e-12:  # noqa: PLR2004  (nothing was moved: there is no mirror to build)
        return rotation
    normal = normal / length
    return rotation - 2 * torch.outer(rotation @ normal, normal)


def random_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """A matrix [width, width], float64, uniform over all orthogonal ones."""
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(gaussian)
    # The signs of R's diagonal are the factorization's choice; uniform needs them positive.
    return (Q * R.diagonal().sign()).contiguous()


def hadamard(width: int) -> tuple[Tensor, int]:
    """The widest normalized Hadamard matrix whose order divides `width`, as built here.

    Returns:
        The matrix, float64 [order, order], orthogonal, and `width / order`.
    """
    matrix, rest = torch.ones(1, 1, dtype=torch.float64), width
    for prime in _odd_prime_factors(width):
        order = 4 * prime
        # One factor of the width's odd part needs two of its factors of two.
        if rest % order == 0 and _is_prime(order - 1):
            matrix, rest = torch.kron(matrix, _paley(order)), rest // order
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    while rest % 2 == 0:
        matrix, rest = torch.kron(matrix, two), rest // 2
    return matrix / matrix.shape[0] ** 0.5, rest


def _paley(order: int) -> Tensor:
    """Paley's first construction: entries 1 and -1 for a prime order - 1 that is 3 mod 4."""
    prime = order - 1
    squares = {value * value % prime for value in range(1, prime)}
    index = torch.arange(prime)
    character = torch.tensor([0] + [1 if v in squares else -1 for v in range(1, prime)])
    matrix = torch.ones(order, order, dtype=torch.float64)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character[(index[None] - index[:, None]) % prime] + torch.eye(prime)
    return matrix


def _odd_prime_factors(number: int) -> list[int]:
    """Odd prime factors, ascending, each as often as it divides."""
    factors, candidate = [], 3
    while number % 2 == 0:
        number //= 2
    while number > 1:
        while number % candidate == 0:
            factors.append(candidate)
            number //= candidate
        candidate += 2
    return factors


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
