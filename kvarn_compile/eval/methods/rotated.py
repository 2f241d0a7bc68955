"""Rotation and plain rounding, no variance normalization: QuaRot's KV cache (Ashkboos et al., arXiv 2404.00456)."""

from torch import Tensor

from kvarn.hadamard import rotate
from kvarn_compile.eval.methods.base import Facts, Method
from kvarn_compile.eval.methods.rounding import asymmetric


class Rotated(Method):
    """Hadamard rotation of K and V, then asymmetric rounding: keys per channel over a tile, values per token."""

    source = "arXiv 2404.00456, rounding axes as upstream's"

    def __init__(self, name: str, facts: Facts, k_bits: int, v_bits: int, group: int = 128):
        super().__init__(name, facts)
        self.k_bits, self.v_bits, self.group = k_bits, v_bits, group

    def store(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Rotate, round, rotate back."""
        keys = asymmetric(rotate(k).unflatten(2, (-1, self.group)), 3, self.k_bits).flatten(2, 3)
        return rotate(keys), rotate(asymmetric(rotate(v), -1, self.v_bits))

    def bytes_per_head(self, tokens: int) -> float:
        """Codes, float16 step and minimum per key channel and value token, and a float16 tail of one tile."""
        dim = self.facts.shape.head_dim
        per_token = dim * (self.k_bits + self.v_bits) / 8 + 4 * dim / self.group + 4
        return tokens * per_token + self.group * 4 * dim
