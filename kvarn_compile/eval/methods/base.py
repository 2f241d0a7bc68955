"""What the harness asks of a method that stores a KV cache."""

from dataclasses import dataclass, field

from torch import Tensor

from kvarn_compile.eval.shape import ModelShape


@dataclass(frozen=True)
class Facts:
    """What a method may know of the model: its shape and, for balanced keys, the key scales per layer [H, D]."""

    shape: ModelShape
    balance: dict[int, Tensor] = field(default_factory=dict)


class Method:
    """Unquantized storage; every method overrides what differs.

    Attributes:
        source: where the method comes from.
    """

    source = "the model's own cache in float16"

    def __init__(self, name: str, facts: Facts):
        self.name, self.facts = name, facts

    def store(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """What later tokens read of finished tokens k, v [B, H, n, D] (after RoPE) at positions start..start+n-1."""
        return k, v

    def own(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens of the unfinished tile read of each other."""
        return k, v

    def bytes_per_head(self, tokens: int) -> float:
        """All bytes that `tokens` tokens of one KV head take: codes, scales, exact rows, tails and sinks."""
        return 4.0 * self.facts.shape.head_dim * tokens

    def bits(self, tokens: int) -> float:
        """Bits per stored element, all in, at a context of `tokens` tokens."""
        return self.bytes_per_head(tokens) * 8 / (2 * self.facts.shape.head_dim * tokens)
