"""Writing tokens into a packed store: the CPU implementation of kvarn::append.

A store is a write-back cache with one open tile per row. Tokens go to the open tile, which lives in the tail. A write
elsewhere closes that tile (rounds it into its record) and opens the other one (from its record), so any write order has
the plain tensor's meaning: appending, a second prompt, a crop, a rollback, a ring buffer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvarn.errors import PositionError, ShapeError
from kvarn.frame import keys_in, values_in
from kvarn.layout import StoreLayout, store_layout
from kvarn.quantize import decode, encode, read_tail, write_tail

_TILES_AT_ONCE = 32
"""Tiles rounded together: bounds the float32 temporaries of a long prompt."""


def append_cpu(k: Tensor, v: Tensor, positions: Tensor, records: Tensor, tail: Tensor, lengths: Tensor,
               balance: Tensor, capacity: int, spec: str) -> None:
    """Store new tokens; lengths of the written rows become their last written position + 1.

    Args:
        k, v: [B', H, n, D] in the cache's dtype, plain frame; rows 0..B'-1 of the store are written.
        positions: [n] or [B', n] int64.
        records, tail, lengths: the store (layout.py), changed in place.
        balance: [H, D] float32.
        capacity: positions of the plain cache; the last tile may have room for more.
        spec: QuantSpec.key.

    Raises:
        ShapeError: if k, v or positions do not fit the store.
        PositionError: if a position is outside 0..capacity - 1.
    """
    layout = store_layout(spec, k.shape[-1], k.dtype)
    rows, tokens = k.shape[0], k.shape[2]
    if k.shape != v.shape or rows > records.shape[0] or k.shape[1] != records.shape[1]:
        raise ShapeError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit a store of {records.shape[0]} rows and "
                         f"{records.shape[1]} heads; valid: equal shapes [rows, heads, tokens, head_dim]")
    if positions.shape[-1] != tokens:
        raise ShapeError(f"{positions.shape[-1]} positions for {tokens} tokens")
    if tokens == 0 or rows == 0:
        return
    positions = positions.expand(rows, tokens)
    low, high = (int(x) for x in positions.aminmax())
    if low < 0 or high >= capacity:
        raise PositionError(f"token position {low if low < 0 else high} is outside the cache's 0..{capacity - 1}")
    store = _Store(layout, records[:rows], tail[:rows], lengths[:rows])
    k, v = keys_in(k, balance, layout), values_in(v, layout)
    for start, end in _runs(positions, layout.spec.group):
        store.write(k[:, :, start:end], v[:, :, start:end], positions[:, start], positions[:, end - 1])


def _runs(positions: Tensor, group: int) -> list[tuple[int, int]]:
    """Cut the tokens of positions [B', n] into runs of consecutive positions, of _TILES_AT_ONCE tiles at most."""
    jumps = ((positions.diff(dim=1) != 1).any(0).nonzero().flatten() + 1).tolist()
    step = _TILES_AT_ONCE * group
    cuts = sorted({0, *jumps, *range(step - int(positions[0, 0]) % group, positions.shape[1], step)})
    return list(zip(cuts, [*cuts[1:], positions.shape[1]], strict=True))


@dataclass(frozen=True)
class _Store:
    """The rows of a store that one append writes."""

    layout: StoreLayout
    records: Tensor
    tail: Tensor
    lengths: Tensor

    def write(self, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> None:
        """Consecutive tokens k, v [B', H, n, D] in the store frame at positions first..last, both [B']."""
        group = self.layout.spec.group
        opened, begin, end = self.open_tiles(), first // group, last // group
        stays = (begin == opened) & (end == opened)
        if not bool(stays.all()):
            left = ((opened < begin) | (opened > end)) & (self.lengths > 0)
            self.close_tail(left.nonzero().flatten(), opened)
            rows = (~stays).nonzero().flatten()
            self.write_window(rows, k[rows], v[rows], first[rows], begin[rows], end[rows], opened[rows])
        rows = stays.nonzero().flatten()
        if len(rows):
            slots = (first[rows, None] + torch.arange(k.shape[2])) % group
            self.tail_tokens(rows, slots, k[rows], v[rows])
        self.lengths.copy_(last + 1)

    def open_tiles(self) -> Tensor:
        """The tile whose tokens the tail holds, [B'] int64."""
        return (self.lengths - 1).clamp_min(0) // self.layout.spec.group

    def tail_tokens(self, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Tokens k, v [N, H, n, D] into the tails of `rows` [N] at `slots` [N, n]."""
        n = k.shape[2]
        write_tail(self.tail, self.layout, rows.repeat_interleave(n), slots.flatten(),
                   k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1))

    def close_tail(self, rows: Tensor, opened: Tensor) -> None:
        """Round the tails of `rows` into the records of their open tiles."""
        if len(rows):
            k, v = read_tail(self.tail[rows], self.layout)
            self.close(rows, opened[rows], k, v)

    def close(self, rows: Tensor, tiles: Tensor, k: Tensor, v: Tensor) -> None:
        """Round tiles k, v [N, H, G, D] into records[rows, :, tiles]; keep a sink tile as it is."""
        self.records[rows, :, tiles] = encode(k, v, self.layout)
        if self.layout.spec.sink:
            first = tiles == 0
            for name, x in (("sink_k", k), ("sink_v", v)):
                self.layout.tail[name].of(self.tail)[rows[first]] = x[first].to(self.layout.dtype)

    def tile(self, rows: Tensor, tiles: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
        """What the store holds of one tile per row: k, v [N, H, G, D]."""
        inside = tiles[:, None, None, None]
        k, v = decode(self.records[rows, :, tiles], self.layout)
        if self.layout.spec.sink:
            k, v = (torch.where(inside == 0, self.layout.tail[name].of(self.tail)[rows], x)
                    for name, x in (("sink_k", k), ("sink_v", v)))
        held = inside == opened[:, None, None, None]
        tail_k, tail_v = read_tail(self.tail[rows], self.layout)
        return torch.where(held, tail_k, k), torch.where(held, tail_v, v)

    def write_window(self, rows: Tensor, k: Tensor, v: Tensor, first: Tensor, begin: Tensor, end: Tensor,
                     opened: Tensor) -> None:
        """Write across tiles begin..end: close all but the last, which becomes the open one."""
        group, count = self.layout.spec.group, int((end - begin).max()) + 1
        index = torch.arange(len(rows))
        slots = (first - begin * group)[:, None] + torch.arange(k.shape[2])
        ends = self.tile(rows, begin, opened), self.tile(rows, end, opened)
        window = []
        for side, x in enumerate((k, v)):
            buffer = x.new_zeros(len(rows), count, x.shape[1], group, x.shape[3])
            buffer[:, 0] = ends[0][side].to(x.dtype)
            buffer[index, end - begin] = ends[1][side].to(x.dtype)
            buffer[index[:, None], slots // group, :, slots % group] = x.transpose(1, 2)
            window.append(buffer)
        tiles = begin[:, None] + torch.arange(count)
        closed = tiles < end[:, None]
        if bool(closed.any()):
            self.close(rows[:, None].expand_as(tiles)[closed], tiles[closed], window[0][closed], window[1][closed])
        slots = torch.arange(group).expand(len(rows), group)
        self.tail_tokens(rows, slots, window[0][index, end - begin], window[1][index, end - begin])
