"""The numbers that describe a model's KV cache."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Layers, query heads, KV heads, channels per head and vocabulary of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
