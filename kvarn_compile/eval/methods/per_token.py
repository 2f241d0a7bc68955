"""The formats serving engines offer without any transform: int4 per token and head, and float8."""

import torch
from torch import Tensor

from kvarn_compile.eval.methods.base import Method
from kvarn_compile.eval.methods.rounding import asymmetric


class Int4(Method):
    """Asymmetric 4-bit rounding of each token's head, float16 step and minimum."""

    source = "per-token, per-head int4, as LMDeploy's quant_policy 4"

    def store(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Round each token by itself."""
        return asymmetric(k, -1, 4), asymmetric(v, -1, 4)

    def bytes_per_head(self, tokens: int) -> float:
        """Codes and two float16 numbers for keys and for values."""
        return tokens * (self.facts.shape.head_dim + 8.0)


class Float8(Method):
    """float8 e4m3 with scale 1."""

    source = "vLLM's --kv-cache-dtype fp8_e4m3, unscaled"

    def store(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Round each element."""
        keys, values = (x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) for x in (k, v))
        return keys, values

    def bytes_per_head(self, tokens: int) -> float:
        """One byte an element."""
        return 2.0 * self.facts.shape.head_dim * tokens
