"""Attention over a packed store: the CPU implementation of kvarn::attend.

One new token per row reads the codes as they are (fold.py); a chunk of tokens unpacks the tiles that its mask can see
and attends its own tokens unrounded.
"""

import torch
from torch import Tensor

from kvarn import fold
from kvarn.frame import keys_in, queries_in, values_in, values_out
from kvarn.layout import StoreLayout, store_layout
from kvarn.quantize import decode, read_tail

_TILES_AT_ONCE = 128
"""Tiles unpacked together, whole heads at a time: bounds the float32 temporaries of a chunk over a long history."""


def attend_cpu(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, records: Tensor, tail: Tensor, lengths: Tensor,
               balance: Tensor, mask: Tensor | None, kv_len: int, is_causal: bool, scale: float, spec: str) -> Tensor:
    """softmax(q K^T * scale + mask) V over positions 0..kv_len-1 of the store, after the append of the same k and v.

    Args:
        q: [B', Hq, n, D]; query head h reads KV head h // (Hq / H).
        k, v: [B', H, n, D], the chunk's own tokens at `positions` [n] or [B', n]: attended unrounded.
        records, tail, lengths, balance: the store (layout.py).
        mask: bool (True attends) or additive float, broadcastable to [B', Hq, n, kv_len]; None attends everything.
        is_causal: query i sees positions 0..i, as in F.scaled_dot_product_attention.
        spec: QuantSpec.key.

    Returns:
        [B', Hq, n, D] contiguous, in q's dtype. Stale or unwritten positions count unless the mask hides them, as in
        the plain tensor.
    """
    layout = store_layout(spec, q.shape[-1], q.dtype)
    rows, group = q.shape[0], layout.spec.group
    if is_causal:
        kv_len = min(kv_len, q.shape[2])
    begin, end = _visible_tiles(mask, kv_len, group)
    opened = (lengths[:rows] - 1).clamp_min(0) // group - begin
    records, tail = records[:rows, :, begin:end], tail[:rows]
    first, last = begin * group, min(end * group, kv_len)
    if mask is not None and mask.shape[-1] != 1:
        mask = mask[..., first:last]
    query = queries_in(q, balance, layout)
    if q.shape[2] == 1 and layout.spec.method == "kvarn":
        out = fold.attend_one(query, records, tail, opened, mask, last - first, scale, layout)
    else:
        own = (keys_in(k, balance, layout), values_in(v, layout), positions.expand(rows, k.shape[2]) - first)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        heads, outs = records.shape[1], []
        at_once = max(1, _TILES_AT_ONCE // max(1, rows * (end - begin)))
        for part in (slice(h, h + at_once) for h in range(0, heads, at_once)):
            asked = slice(part.start * q.shape[1] // heads, part.stop * q.shape[1] // heads)
            key, value = _unpacked(records[:, part], tail[:, part], opened, (own[0][:, part], own[1][:, part], own[2]),
                                   begin, layout)
            per_head = mask is not None and mask.dim() >= 3 and mask.shape[-3] != 1
            outs.append(torch.nn.functional.scaled_dot_product_attention(
                query[:, asked], key[:, :, : last - first], value[:, :, : last - first],
                mask[..., asked, :, :] if per_head else mask,  # type: ignore[index]
                is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != heads))
        out = torch.cat(outs, 1)
    return values_out(out, layout).to(q.dtype).contiguous()


def _visible_tiles(mask: Tensor | None, kv_len: int, group: int) -> tuple[int, int]:
    """Tiles begin..end-1 outside of which the mask hides everything from every query.

    transformers writes finfo.min where it means -inf. Both give a weight of exactly zero as long as the query sees
    anything at all; if one sees nothing, no tile is skipped.
    """
    everything = 0, -(-kv_len // group)
    if mask is None or mask.shape[-1] != kv_len or kv_len == 0:
        return everything
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if not bool(seen.any(-1).all()):
        return everything
    where = seen.flatten(0, -2).any(0).nonzero()
    return int(where[0]) // group, int(where[-1]) // group + 1


def _unpacked(records: Tensor, tail: Tensor, opened: Tensor, own: tuple[Tensor, Tensor, Tensor], begin: int,
              layout: StoreLayout) -> tuple[Tensor, Tensor]:
    """All tokens of the tiles from `begin` on, k and v [B', H, tiles * G, D] in the store frame.

    The chunk's own tokens, own = (k, v, positions [B', n]), stand unrounded. opened and own's positions count from the
    tile `begin`.
    """
    rows = torch.arange(records.shape[0])
    held = (opened >= 0) & (opened < records.shape[2])
    sides = []
    for side, (tile, tokens) in enumerate(zip(decode(records, layout), read_tail(tail, layout), strict=True)):
        tile = tile.clone() if layout.spec.method == "raw" else tile
        if layout.spec.sink and begin == 0:
            tile[:, :, 0] = layout.tail[("sink_k", "sink_v")[side]].of(tail)
        tile[rows[held], :, opened[held]] = tokens[held].to(tile.dtype)
        flat = tile.flatten(2, 3)
        inside = (own[2] >= 0) & (own[2] < flat.shape[2])
        row, token = inside.nonzero(as_tuple=True)
        flat[row, :, own[2][inside]] = own[side][row, :, token].to(flat.dtype)
        sides.append(flat)
    return sides[0], sides[1]

