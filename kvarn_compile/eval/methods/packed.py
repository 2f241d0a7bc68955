"""kvarn's own records, through the product's quantizer: any QuantSpec, upstream's algorithm among them.

Nothing is computed here: tokens go to the store frame (kvarn/frame.py), through the tail (kvarn/quantize.py) and into
records, and what is attended later is what those records decode to.
"""

import torch
from torch import Tensor

from kvarn.frame import keys_in, keys_out, unit_balance, values_in, values_out
from kvarn.layout import StoreLayout
from kvarn.quantize import decode, encode, read_tail, write_tail
from kvarn.spec import QuantSpec
from kvarn_compile.eval.methods.base import Facts, Method


class Packed(Method):
    """Tiles in records of a spec, balanced if the facts hold scales and `balanced`.

    `tail_read`: tokens of the unfinished tile read each other from the tail, themselves included (an upper bound of
    what decoding loses there: it attends its newest token exactly).
    """

    source = "kvarn/closed.py"

    def __init__(self, name: str, facts: Facts, spec: QuantSpec, balanced: bool = True, tail_read: bool = False):
        super().__init__(name, facts)
        self.layout = StoreLayout(spec, facts.shape.head_dim, torch.float32)
        self.balanced, self.tail_read = balanced, tail_read
        if spec.method == "upstream":
            self.source = "arXiv 2606.03458 to the letter (kvarn/upstream.py)"

    def balance(self, layer: int, heads: int, like: Tensor) -> Tensor:
        """The key scale [H, D] of a layer."""
        if self.balanced and layer in self.facts.balance:
            return self.facts.balance[layer].to(like.device)
        return unit_balance(heads, like.shape[-1], like.device)

    def store(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Through the tail into records and back."""
        spec = self.layout.spec
        if spec.sink and start < spec.group:
            return k, v
        balance = self.balance(layer, k.shape[1], k)
        k, v = self._through_tail(*self._in(k, v, balance))
        k_hat, v_hat = decode(encode(_tiles(k, spec.group), _tiles(v, spec.group), self.layout), self.layout)
        return self._out(_tokens(k_hat), _tokens(v_hat), balance)

    def own(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Exact, or with `tail_read` what the tail holds."""
        if not self.tail_read:
            return k, v
        balance = self.balance(layer, k.shape[1], k)
        return self._out(*self._through_tail(*self._in(k, v, balance)), balance)

    def bytes_per_head(self, tokens: int) -> float:
        """Records of all tiles and one tail, of a float16 cache."""
        served = StoreLayout(self.layout.spec, self.layout.head_dim, torch.float16)
        return served.tiles(tokens) * served.record_bytes + served.tail_bytes

    def _in(self, k: Tensor, v: Tensor, balance: Tensor) -> tuple[Tensor, Tensor]:
        return keys_in(k, balance, self.layout), values_in(v, self.layout)

    def _out(self, k: Tensor, v: Tensor, balance: Tensor) -> tuple[Tensor, Tensor]:
        return keys_out(k, balance, self.layout), values_out(v, self.layout)

    def _through_tail(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, H, n, D], n a multiple of the tile's length, as the tail would hold them."""
        tiles = [_tiles(x, self.layout.spec.group).transpose(1, 2) for x in (k, v)]  # [B, T, H, G, D]
        batch, count, heads, group, _ = tiles[0].shape
        tail = torch.zeros(batch * count, heads, self.layout.tail_bytes, dtype=torch.uint8, device=k.device)
        rows = torch.arange(batch * count, device=k.device).repeat_interleave(group)
        slots = torch.arange(group, device=k.device).repeat(batch * count)
        write_tail(tail, self.layout, rows, slots, *(x.transpose(2, 3).flatten(0, 2) for x in tiles))
        held = (x.float().unflatten(0, (batch, count)).transpose(1, 2) for x in read_tail(tail, self.layout))
        k, v = (_tokens(x) for x in held)
        return k, v


def _tiles(x: Tensor, group: int) -> Tensor:
    """[B, H, n, D] to [B, H, n / G, G, D]."""
    return x.unflatten(2, (-1, group))


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2, 3)
