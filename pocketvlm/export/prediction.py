"""What every target counts of a model beside its weight matrices."""

from __future__ import annotations

from pocketvlm.models.spec import ModelSpec

__all__ = ["angle_elements", "other_elements"]


def other_elements(spec: ModelSpec) -> tuple[int, int]:
    """Numbers outside of weight matrices: of patches and positions, and of norms and biases."""
    tower = spec.tower
    positions = 0 if tower.position_embedding is None else tower.tokens
    patch_weights = tower.channels * tower.patch_size**2
    embeddings = (
        patch_weights + positions + int(tower.has_cls) + int(tower.has_patch_bias)
    ) * tower.hidden_size
    norms = sum(norm.width * (1 + norm.has_bias) for norm in spec.norms())
    biases = sum(linear.out_features for linear in spec.linears() if linear.has_bias)
    kernels = sum(
        (conv.taps + int(conv.has_bias)) * spec.decoder.hidden_size
        for conv in spec.decoder.convolutions.values()
    )
    return embeddings, norms + biases + kernels


def angle_elements(spec: ModelSpec) -> int:
    """Cosines and sines by which a tower turns its patches, a channel of a head each."""
    tower = spec.tower
    return 0 if tower.rope_theta is None else 2 * tower.patches * tower.head_dim
