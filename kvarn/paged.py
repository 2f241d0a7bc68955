"""Append and attend on a paged store (paged_layout.py): the CPU implementations of kvarn::append_paged, attend_paged.

A step brings tokens of several rows, row after row: row b's are starts[b] .. starts[b + 1] - 1 of k, v and q, and they
are the last of its ends[b] tokens. An append closes every tile that it fills at once, so that a block can be shared by
its content (prefix caching) in the step that completes it; the tokens stay in the open tile's place as well, for a row
that takes the last few of them back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvarn.attention import attend_cpu
from kvarn.errors import ShapeError
from kvarn.frame import keys_in, values_in
from kvarn.paged_layout import PagedLayout, paged_layout
from kvarn.quantize import encode, read_tail, write_tail

_TILES_AT_ONCE = 32
"""Tiles rounded together: bounds the float32 temporaries of a long prompt."""

_UNPACKED_ELEMENTS = 1 << 26
"""Key elements of the rows attended together: bounds their gathered (and for a chunk unpacked) copies."""


@dataclass(frozen=True)
class Batch:
    """Which rows and positions the tokens of a step are.

    Attributes:
        table: [B, N] int64, each row's blocks.
        starts: [B + 1] int64, where each row's tokens start.
        count, first, end: [B] int64: the row's new tokens, the first one's position, the row's length after them.
    """

    table: Tensor
    starts: Tensor
    count: Tensor
    first: Tensor
    end: Tensor

    @staticmethod
    def of(table: Tensor, starts: Tensor, ends: Tensor) -> "Batch":
        """From what a server keeps: table [B, N], starts [B + 1], ends [B], of any integer type."""
        starts, end = starts.long(), ends.long()
        count = starts.diff()
        return Batch(table.long(), starts, count, end - count, end)


def unpacked_starts(starts: Tensor, ends: Tensor) -> Tensor:
    """[B + 1] int32: where rows' keys start when they are unpacked one row after the other. A row without new tokens
    has none."""
    found = torch.zeros_like(starts, dtype=torch.int32)
    found[1:] = torch.where(starts.diff() > 0, ends, 0).cumsum(0)
    return found


def append_paged_cpu(k: Tensor, v: Tensor, cache: Tensor, table: Tensor, starts: Tensor, ends: Tensor,
                     balance: Tensor, spec: str) -> None:
    """Store a step's tokens.

    Args:
        k, v: [n, H, D] in the model's dtype, plain frame; tokens from starts[B] on are padding.
        cache: [blocks, H, record_bytes] uint8, changed in place.
        table: [B, N] int32, blocks of each row; a row's length needs PagedLayout.blocks(ends[b]) of them.
        starts: [B + 1] int32, ends: [B] int32 (above).
        balance: [H, D] float32.
        spec: QuantSpec.key.

    Raises:
        ShapeError: if k and v do not fit the cache.
    """
    layout, batch = paged_layout(spec, k.shape[-1], k.dtype), Batch.of(table, starts, ends)
    if k.shape != v.shape or (k.shape[1], layout.record_bytes) != cache.shape[1:]:
        raise ShapeError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit a cache {tuple(cache.shape)}; valid: "
                         f"equal shapes [tokens, heads, head_dim] and a cache [blocks, heads, {layout.record_bytes}]")
    row = torch.repeat_interleave(batch.count)
    position = batch.first[row] + torch.arange(len(row)) - batch.starts[row]
    k = keys_in(k[: len(row)].transpose(0, 1)[None], balance, layout)[0].transpose(0, 1)
    v = values_in(v[: len(row)].transpose(0, 1)[None], layout)[0].transpose(0, 1)
    _close_tiles(k, v, row, position, cache, batch, layout)
    _write_open(k, v, row, position, cache, batch, layout)


def _close_tiles(k: Tensor, v: Tensor, row: Tensor, position: Tensor, cache: Tensor, batch: Batch,
                 layout: PagedLayout) -> None:
    """Round every tile that the step completes; its older tokens are those of the row's open tile."""
    group = layout.spec.group
    begin = batch.first // group
    count = torch.where(batch.count > 0, batch.end // group - begin, 0)
    rows = torch.repeat_interleave(count)
    if not len(rows):
        return
    start = count.cumsum(0) - count
    tiles = begin[rows] + torch.arange(len(rows)) - start[rows]
    inside = position // group < (begin + count)[row]
    at = (start[row] + position // group - begin[row])[inside]
    cut = ((count > 0) & (batch.first % group > 0)).nonzero().flatten()
    sides = []
    for x, old in zip((k, v), _read_open(cache, batch.table[cut], begin[cut], layout), strict=True):
        side = x.new_zeros(len(rows), group, *x.shape[1:])
        side[start[cut]] = old.transpose(1, 2).to(x.dtype)
        side[at, position[inside] % group] = x[inside]
        sides.append(side.transpose(1, 2))
    for part in torch.arange(len(rows)).split(_TILES_AT_ONCE):
        cache[batch.table[rows[part], tiles[part]]] = encode(sides[0][part], sides[1][part], layout)


def _write_open(k: Tensor, v: Tensor, row: Tensor, position: Tensor, cache: Tensor, batch: Batch,
                layout: PagedLayout) -> None:
    """The tokens of each row's last tile into its open place; of the tile before too, where both have room."""
    group = layout.spec.group
    last = (batch.end - 1).clamp_min(0) // group
    fill = batch.end - last * group
    both = (fill <= layout.page) & (fill < group)
    keep = position // group >= (last - both.long())[row]
    row, tile, slot = row[keep], position[keep] // group, position[keep] % group
    block = batch.table[row, tile + layout.spare - slot // layout.page]
    write_tail(cache, layout, block, slot % layout.page, k[keep], v[keep])


def _read_open(cache: Tensor, table: Tensor, tile: Tensor, layout: PagedLayout) -> tuple[Tensor, Tensor]:
    """The tokens k, v [b, H, G, D] of the open tile of each row; table [b, N], tile [b]."""
    pages = _open_pages(cache, table, tile, layout)
    k, v = (x.transpose(1, 2).flatten(2, 3)[:, :, : layout.spec.group] for x in read_tail(pages, layout))
    return k, v


def _open_pages(cache: Tensor, table: Tensor, tile: Tensor, layout: PagedLayout) -> Tensor:
    """The blocks of each row's open tile, [b, spare, H, record_bytes], first page first."""
    return cache[table.gather(1, tile[:, None] + layout.spare - torch.arange(layout.spare))]


def attend_paged_cpu(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, table: Tensor, starts: Tensor, ends: Tensor,
                     balance: Tensor, max_count: int, max_end: int, scale: float, spec: str) -> Tensor:
    """Causal attention of a step's tokens over their rows, after the append of the same k and v.

    Args:
        q: [n, Hq, D]; query head h reads KV head h // (Hq / H).
        k, v: [n, H, D], the step's own tokens: attended unrounded.
        cache, table, starts, ends, balance: as in append_paged.
        max_count, max_end: the largest count of a row's tokens and of its length, or more: sizes for a launcher that
            must not wait for the device.
        spec: QuantSpec.key.

    Returns:
        [n, Hq, D] contiguous, in q's dtype; zeros for padding tokens.
    """
    layout, batch = paged_layout(spec, q.shape[-1], q.dtype), Batch.of(table, starts, ends)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for rows in _alike(batch, k.shape[1], layout):
        token = batch.starts[rows][:, None] + torch.arange(int(batch.count[rows[0]]))
        own = q[token].transpose(1, 2), k[token].transpose(1, 2), v[token].transpose(1, 2)
        if batch.first[rows[0]] == 0:
            part = torch.nn.functional.scaled_dot_product_attention(
                *own, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        else:
            part = _attend_blocks(own, rows, cache, batch, balance, scale, layout)
        out[token] = part.transpose(1, 2)
    return out


def _alike(batch: Batch, heads: int, layout: PagedLayout) -> list[Tensor]:
    """Rows to attend together: as many new tokens each, with or without older ones, a bounded number of positions."""
    parts = []
    kinds = torch.stack([batch.count, (batch.first > 0).long()], 1)
    for kind in kinds[batch.count > 0].unique(dim=0):
        rows = (kinds == kind).all(1).nonzero().flatten()
        positions = layout.tiles(int(batch.end[rows].max())) * layout.spec.group
        parts += rows.split(max(1, _UNPACKED_ELEMENTS // (positions * heads * layout.head_dim)))
    return parts


def _attend_blocks(own: tuple[Tensor, Tensor, Tensor], rows: Tensor, cache: Tensor, batch: Batch, balance: Tensor,
                   scale: float, layout: PagedLayout) -> Tensor:
    """Rows with older tokens: their blocks, gathered, are a contiguous store.

    own: the rows' new q [b, Hq, n, D] and k, v [b, H, n, D].
    """
    table, end = batch.table[rows], batch.end[rows]
    opened, length = (end - 1) // layout.spec.group, int(end.max())
    records = cache[table[:, : layout.tiles(length)]]
    records[torch.arange(records.shape[1]) >= opened[:, None]] = 0
    position = batch.first[rows][:, None] + torch.arange(own[0].shape[2])
    mask = torch.arange(length) <= position[:, :, None]
    tail = _tail(_open_pages(cache, table, opened, layout), end - opened * layout.spec.group, layout)
    return attend_cpu(*own, position, records.transpose(1, 2), tail, end, balance, mask[:, None], length, False, scale,
                      layout.spec.key)


def _tail(pages: Tensor, fill: Tensor, layout: PagedLayout) -> Tensor:
    """Pages [b, spare, H, record_bytes] as a contiguous store's tail [b, H, tail_bytes], zero from `fill` [b] on."""
    tail = pages.new_zeros(pages.shape[0], pages.shape[2], layout.whole.tail_bytes)
    unused = torch.arange(layout.spec.group) >= fill[:, None]
    for name, field in layout.whole.tail.items():
        tokens = layout.tail[name].of(pages).transpose(1, 2).flatten(2, 3)[:, :, : layout.spec.group]
        hidden = unused[:, None, :, None] if tokens.dim() == 4 else unused[:, None]
        field.of(tail).copy_(tokens.masked_fill(hidden, 0))
    return tail
