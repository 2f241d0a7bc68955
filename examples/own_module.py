"""A module of one's own, with the KV cache in buffers and written by index, as gpt-fast does.

Nothing in it knows kvarn. After the first compiled call the buffers' memory is freed; the store holds the content.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvarn_compile import release


class Attention(nn.Module):
    """Self-attention, 4 query heads on 2 KV heads, with a cache of 1,024 positions; no position encoding."""

    def __init__(self, dim: int = 256, heads: int = 4, kv_heads: int = 2, head_dim: int = 64, capacity: int = 1024):
        super().__init__()
        self.sizes = (heads, kv_heads, kv_heads)
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, sum(self.sizes) * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.register_buffer("k_cache", torch.zeros(1, kv_heads, capacity, head_dim))
        self.register_buffer("v_cache", torch.zeros(1, kv_heads, capacity, head_dim))
        self.register_buffer("causal", torch.ones(capacity, capacity, dtype=torch.bool).tril())

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [1, n, dim] at positions int64 [n] -> [1, n, dim]."""
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.sizes, 2))
        self.k_cache[:, :, positions] = k
        self.v_cache[:, :, positions] = v
        y = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, self.causal[positions], enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def main(preset: str = "k8v8_g128") -> tuple[float, int]:
    """The relative error of decoding 300 tokens, one by one after a prompt of 200, and how many caches were packed."""
    torch.manual_seed(0)
    plain, packed = Attention().eval(), Attention().eval()
    packed.load_state_dict(plain.state_dict())
    compiled = torch.compile(packed, backend="kvarn", options={"preset": preset, "inner": "eager"})
    x = torch.randn(1, 300, 256)
    error = torch.zeros(2)
    with torch.no_grad():
        for start, end in [(0, 200), *((t, t + 1) for t in range(200, 300))]:
            positions = torch.arange(start, end)
            want, got = plain(x[:, start:end], positions), compiled(x[:, start:end], positions)
            error += torch.stack([(got - want).square().sum(), want.square().sum()])
    return (error[0] / error[1]).sqrt().item(), release(packed)


if __name__ == "__main__":
    relative, caches = main()
    print(f"relative error {relative:.4f}; {caches} cache was packed and is plain again")
