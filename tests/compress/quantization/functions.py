"""What a checkpoint computes, and how to make rounding it hard: shared by tests of transforms."""

from __future__ import annotations

import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.weights.dense import DenseWeight


def logits_of(checkpoint: Checkpoint, seed: int = 0) -> torch.Tensor:
    """Logits after every token of a prompt with a picture of noise."""
    spec = checkpoint.spec
    side = spec.tower.height
    pixels = torch.randn(
        1, spec.tower.channels, side, side, generator=torch.Generator().manual_seed(seed)
    )
    ids = torch.tensor([[5, 6, *[spec.image_token_id] * spec.visual_tokens, 7, 8, 9]])
    with torch.inference_mode():
        visual = encode_images(checkpoint, pixels)
        return decode_logits(checkpoint, embed_prompts(checkpoint, ids, visual))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


READERS = {
    "layer_norm1": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "layer_norm2": ["mlp.fc1"],
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}


def plant_outliers(checkpoint: Checkpoint, factor: float = 20.0) -> Checkpoint:
    """Makes one channel in sixteen after every norm much larger than the others.

    The columns that read it become as much smaller: the model computes what it did, and rounding
    it hurts more, since those columns are now small beside their neighbours.
    """
    model, spec = checkpoint.model, checkpoint.spec
    readers = {
        f"{path}.{norm}": [f"{path}.{name}" for name in names]
        for path, _ in model.named_modules()
        for norm, names in READERS.items()
        if hasattr(model.get_submodule(path), norm)
    }
    if spec.tower.has_post_norm:
        readers[f"{spec.tower.prefix}.post_layernorm"] = [spec.projector.linears[0]]
    if not spec.decoder.tied_head:
        readers[spec.decoder.norm] = [spec.decoder.head]
    for norm, names in readers.items():
        module = model.get_submodule(norm)
        module.weight[3::16] *= factor
        if getattr(module, "bias", None) is not None:
            module.bias[3::16] *= factor
        for name in names:
            values = checkpoint.form(name).dequantize()
            values[:, 3::16] /= factor  # widths are multiples of 16: every copy has its own
            checkpoint.set_form(name, DenseWeight(values=values))
    return checkpoint


def stored_bytes_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every byte of every weight, vectors included."""
    tensors = {name: value.detach() for name, value in checkpoint.model.named_parameters()}
    for linear, form in checkpoint.forms().items():
        tensors |= {f"{linear.name}.{key}": value for key, value in form.to_tensors().items()}
    return {
        name: value.contiguous().view(torch.uint8).numpy().tobytes()
        for name, value in tensors.items()
    }
