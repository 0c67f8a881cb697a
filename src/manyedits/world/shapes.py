"""The sizes of the miniature: Qwen3's architecture (its norm of queries and keys steadies small models), tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Qwen3Config


@dataclass(frozen=True)
class Shape:
    """A size: width, inner width, layers, and how much it reads (1: see documents.py) as base and as instruct."""

    width: int
    inner: int
    layers: int
    heads: int
    base: float  # of the exercises
    epochs: int  # of the facts, as base
    instruct: float
    site: int  # the layer after which a subject's last token is taught to hold what is known of it


SHAPES = {
    "s": Shape(width=64, inner=192, layers=4, heads=4, base=1.5, epochs=30, instruct=0.7, site=1),
    "m": Shape(width=128, inner=384, layers=6, heads=4, base=1.25, epochs=36, instruct=0.5, site=2),
    "l": Shape(width=192, inner=640, layers=8, heads=6, base=0.8, epochs=24, instruct=0.15, site=3),
}

CONTEXT = 256


def config_of(shape: Shape, words: int) -> Qwen3Config:
    """The configuration of a size for a vocabulary."""
    return Qwen3Config(
        vocab_size=words,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
