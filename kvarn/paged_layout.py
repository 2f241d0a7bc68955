"""Where a packed KV cache lies when a server owns the memory: one block of a layer is one tile, open tiles included.

    cache  [blocks, H, record_bytes] uint8   block = one tile of every KV head
    table  [B, N] int32                      row b's blocks, in the order of its tiles, then `spare` more

A closed tile t is the record in block table[b, t]. The tokens of the open tile t lie, not yet rounded, in the `spare`
blocks that follow: token s of the tile in block table[b, t + spare - s // page], slot s % page. A block holds a page of
tokens in the tail format of kvarn/layout.py. Nothing else exists: no side pool, no state per request.

The order is descending so that the first page of tile t + 1 goes to a block which tile t does not use: for that long,
both tiles' tokens are there, and a write that goes back into tile t (speculation rolled back) finds them.
"""

from functools import cached_property, lru_cache
from math import prod

import torch

from kvarn.errors import SpecError
from kvarn.layout import ALIGN, Field, StoreLayout
from kvarn.spec import QuantSpec


class PagedLayout(StoreLayout):
    """A StoreLayout whose tail is one page: what of the open tile fits a block.

    Raises:
        ShapeError: if the head dimension or dtype has no layout under this spec.
        SpecError: if the spec has a sink: a sequence's first tile would need a place of its own.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.spec.sink:
            raise SpecError(f"{self.spec.key}: a preset with a 16-bit first tile has no paged form; valid: one without "
                            "a sink, such as 'k4v2_g128'")

    @cached_property
    def whole(self) -> StoreLayout:
        """The same store with one tail per row, as kvarn::append and kvarn::attend know it."""
        return StoreLayout(self.spec, self.head_dim, self.dtype)

    @cached_property
    def page(self) -> int:
        """Tokens of an open tile that one block holds, at most G."""
        tokens = min(self.spec.group, self.record_bytes // self.token_bytes)
        while _end(self._fields(tokens)) > self.record_bytes:
            tokens -= 1
        return tokens

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token of one head in the tail format."""
        return sum(field.dtype.itemsize * prod(field.shape[1:]) for field in self.whole.tail.values())

    @property
    def spare(self) -> int:
        """Blocks beyond its tiles that a sequence needs for its open tile."""
        return -(-self.spec.group // self.page)

    def blocks(self, tokens: int) -> int:
        """Blocks of a sequence of `tokens` tokens."""
        return self.tiles(tokens) + self.spare

    @cached_property
    def tail(self) -> dict[str, Field]:
        """The fields of a page by name: those of a StoreLayout's tail, for `page` tokens instead of G."""
        return self._fields(self.page)

    def _fields(self, tokens: int) -> dict[str, Field]:
        fields, offset = {}, 0
        for name, whole in self.whole.tail.items():
            fields[name] = Field(offset, (tokens, *whole.shape[1:]), whole.dtype)
            offset += -(-fields[name].nbytes // ALIGN) * ALIGN
        return fields


def _end(fields: dict[str, Field]) -> int:
    return max(f.offset + f.nbytes for f in fields.values())


@lru_cache(maxsize=256)
def paged_layout(key: str, head_dim: int, dtype: torch.dtype) -> PagedLayout:
    """The layout for a spec key (QuantSpec.key), cached: ops look it up on every call."""
    return PagedLayout(QuantSpec.from_key(key), head_dim, dtype)
