"""What kvarn_compile.explain says: two attentions of one model, one packed, one left alone with its reason."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kvarn_compile


class Layer(nn.Module):
    """One attention of 2 heads over a cache of 256 positions, which it may also look at in another way."""

    def __init__(self, peek: bool):
        super().__init__()
        self.peek = peek
        self.register_buffer("k_cache", torch.zeros(1, 2, 256, 64))
        self.register_buffer("v_cache", torch.zeros(1, 2, 256, 64))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """x [1, 2, n, 64] at positions int64 [n], mask [n, 256] -> [1, 2, n, 64]."""
        self.k_cache[:, :, positions] = x
        self.v_cache[:, :, positions] = x
        y = F.scaled_dot_product_attention(x, self.k_cache, self.v_cache, mask)
        return y * self.k_cache.norm() if self.peek else y  # a packed cache has no norm: this refuses the pair


class Model(nn.Module):
    """A plain layer and a peeking one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(peek=False), Layer(peek=True)])

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """As Layer.forward."""
        for layer in self.layers:
            x = layer(x, positions, mask)
        return x


def main() -> kvarn_compile.Explanation:
    """The explanation; print it for a table."""
    positions = torch.arange(8)
    mask = torch.ones(256, 256, dtype=torch.bool).tril()[positions]
    with torch.no_grad():
        return kvarn_compile.explain(Model(), torch.randn(1, 2, 8, 64), positions, mask)


if __name__ == "__main__":
    print(main())
