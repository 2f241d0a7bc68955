"""TurboQuant as vLLM ships it (vllm-project/vllm pull request 38479; Zandieh et al., arXiv 2504.19874).

Keys: over their norm, Hadamard-rotated, each coordinate to the nearest centroid of the Lloyd-Max quantizer of a
Gaussian; the centroid vector is scaled back to unit length ("nc"). Values: not rotated, asymmetric per token. Preset
k8v4 keeps keys as they are in float8 e4m3. vLLM can keep the first and last two layers in float16 on top ("skip"),
which costs bits.
"""

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from kvarn.hadamard import rotate
from kvarn_compile.eval.methods.base import Facts, Method
from kvarn_compile.eval.methods.rounding import asymmetric

_SKIPPED = 2


class TurboQuant(Method):
    """k_bits 3 or 4 (Lloyd-Max) or 8 (float8), v_bits 3 or 4."""

    source = "vLLM's turboquant_* cache dtypes, arXiv 2504.19874"

    def __init__(self, name: str, facts: Facts, k_bits: int, v_bits: int, skip: bool = False):
        super().__init__(name, facts)
        self.k_bits, self.v_bits, self.skip = k_bits, v_bits, skip

    def store(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Round each token by itself."""
        if self.skip and min(layer, self.facts.shape.layers - 1 - layer) < _SKIPPED:
            return k, v
        if self.k_bits == 8:
            keys = k.clamp(-448, 448).to(torch.float8_e4m3fn).to(k.dtype)
        else:
            keys = self._keys(k)
        return keys, asymmetric(v, -1, self.v_bits)

    def _keys(self, k: Tensor) -> Tensor:
        norm = k.norm(dim=-1, keepdim=True)
        centroids = torch.tensor(lloyd_max(self.k_bits), device=k.device) * k.shape[-1] ** -0.5
        y = rotate(k / norm.clamp_min(1e-8)).contiguous()
        y = centroids[torch.bucketize(y, (centroids[1:] + centroids[:-1]) / 2)]
        y = y / y.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        return rotate(y) * norm.half().float()

    def bytes_per_head(self, tokens: int) -> float:
        """Codes, float16 norm of keys, float16 step and minimum of values; skipped layers in float16."""
        dim, layers = self.facts.shape.head_dim, self.facts.shape.layers
        per_token = dim * (self.k_bits + self.v_bits) / 8 + (4 if self.k_bits == 8 else 6)
        skipped = min(2 * _SKIPPED, layers) / layers if self.skip else 0.0
        return tokens * ((1 - skipped) * per_token + skipped * 4 * dim)


@lru_cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """Centroids of the MSE-optimal 2^bits-level quantizer of a unit Gaussian (Max 1960, Lloyd 1982)."""
    levels = 2**bits
    points = [3.0 * (2 * i + 1 - levels) / levels for i in range(levels)]
    for _ in range(2000):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(points)), math.inf]
        points = [(_density(a) - _density(b)) / (_mass(b) - _mass(a)) for a, b in pairwise(edges)]
    return tuple(points)


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _mass(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2
