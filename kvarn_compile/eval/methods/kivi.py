"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750): keys per channel, values per token, asymmetric, in groups."""

from torch import Tensor

from kvarn_compile.eval.methods.base import Facts, Method
from kvarn_compile.eval.methods.rounding import asymmetric


class Kivi(Method):
    """Keys in groups of `group` tokens per channel, values in groups of `group` channels per token.

    The newest 128 tokens stay in float16 (the paper's residual), which the harness' exact chunk stands for.
    """

    source = "arXiv 2402.02750"
    residual = 128

    def __init__(self, name: str, facts: Facts, k_bits: int, v_bits: int, group: int = 32):
        super().__init__(name, facts)
        self.k_bits, self.v_bits, self.group = k_bits, v_bits, group

    def store(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Round finished tokens."""
        keys = asymmetric(k.unflatten(2, (-1, self.group)), 3, self.k_bits).flatten(2, 3)
        values = asymmetric(v.unflatten(3, (-1, self.group)), 4, self.v_bits).flatten(3, 4)
        return keys, values

    def bytes_per_head(self, tokens: int) -> float:
        """Codes, a float16 step and minimum per group of keys and of values, and the residual."""
        dim = self.facts.shape.head_dim
        per_token = dim * (self.k_bits + self.v_bits) / 8 + 2 * dim * 4 / self.group
        return tokens * per_token + self.residual * 4 * dim
