"""A tower that already sees: what the decoder learns language on before there is a real tower.

Real vision-language models start from a pretrained language model. The counterpart here is a
decoder that answers questions about scenes given to it as symbols: the visual token of a patch is
the sum of one vector per thing that the patch shows plus one vector for where it is. Learning to
bind ("the colour of the *triangle*") is then separate from learning to see, and is learned once for
both models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from pocketvlm.reference.dataset import ATTRIBUTES
from pocketvlm.reference.scenes import PATCH_GRID, WORDS
from pocketvlm.reference.tokenizer import build_tokenizer

__all__ = ["Oracle", "initialise_decoder"]


class Oracle(nn.Module):
    """Turns patch labels into the visual tokens that an ideal tower would give."""

    def __init__(self, embedding: Tensor) -> None:
        """Starts every attribute at the embedding of the words that name it.

        Args:
            embedding: The decoder's token embedding, ``(vocabulary, hidden)``.
        """
        super().__init__()
        embedding = embedding.detach()
        vectors = {name: _meaning(embedding, name) for name in ATTRIBUTES}
        for word in WORDS:
            vectors[word] = vectors[word] + _meaning(embedding, "word")
        self.attributes = nn.Parameter(torch.stack([vectors[name] for name in ATTRIBUTES]))
        self.row_places = nn.Parameter(_places(embedding, ("top", "above"), ("bottom", "below")))
        self.column_places = nn.Parameter(_places(embedding, ("left",), ("right",)))

    def forward(self, labels: Tensor) -> Tensor:
        """Maps labels ``(batch, patches, attributes)``, 0 to 1, to ``(batch, patches, hidden)``."""
        places = self.row_places[:, None] + self.column_places[None, :]
        return labels @ self.attributes + places.flatten(0, 1)


def _meaning(embedding: Tensor, word: str) -> Tensor:
    """Sum of a word's embeddings with and without the space before it."""
    tokenizer = build_tokenizer("pocket-llava")
    forms = [tokenizer(form)["input_ids"] for form in (word, f" {word}")]
    return torch.stack([embedding[ids].mean(0) for ids in forms]).sum(0)


def _places(embedding: Tensor, first: tuple[str, ...], last: tuple[str, ...]) -> Tensor:
    """Vectors of the places along one axis: from the words of one end to those of the other."""
    start, end = (
        torch.stack([_meaning(embedding, word) for word in words]).sum(0) for words in (first, last)
    )
    share = torch.linspace(0, 1, PATCH_GRID)[:, None]
    own = embedding.std() * torch.randn(PATCH_GRID, embedding.shape[1])
    return (1 - share) * start + share * end + own


@torch.no_grad()
def initialise_decoder(
    decoder: LlamaForCausalLM, *, matching: float = 1.0, copying: float = 0.4
) -> None:
    """Starts attention where equal tokens look at each other and copy what they see.

    Mimetic initialisation (Trockman and Kolter, 2023): every query projection begins as its key
    projection, so a word attends to the patches that show it from the first step on. Without it the
    binding questions stay at chance for a long plateau.

    Args:
        decoder: The decoder to initialise in place.
        matching: Scale of the shared part of queries and keys.
        copying: Scale of the part of the output projection that undoes the value projection.
    """
    config = decoder.config
    hidden, width = config.hidden_size, config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    nn.init.normal_(decoder.model.embed_tokens.weight, std=hidden**-0.5)
    for layer in decoder.model.layers:
        attention = layer.self_attn
        for weight in (attention.k_proj.weight, attention.v_proj.weight):
            for head in weight.split(width):
                nn.init.orthogonal_(head)
        keys = attention.k_proj.weight.view(-1, 1, width, hidden).expand(-1, group, -1, -1)
        noise = torch.randn_like(attention.q_proj.weight) * (0.5 * hidden**-0.5)
        attention.q_proj.weight.copy_(matching * keys.reshape(-1, hidden) + noise)
        values = attention.v_proj.weight.view(-1, 1, width, hidden).expand(-1, group, -1, -1)
        noise = torch.randn_like(attention.o_proj.weight) * (0.2 * hidden**-0.5)
        attention.o_proj.weight.copy_(copying / group * values.reshape(-1, hidden).T + noise)
