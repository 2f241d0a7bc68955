"""Attention of a step's few tokens per row on a GPU: two launches over packed tiles, three with a mask.

Contiguous stores and paged ones run the same kernels (kvarn/kernels/decode.py); nothing waits for the device, and what
a launch needs to know of lengths are upper bounds, so that a step can be captured in a CUDA graph.

One difference from the CPU implementations: the step's own tokens are read back from where the append put them, the
open tile (keys of 10 bits, values of 6) or, where they completed a tile, its record, and not from k and v.
"""

import torch
from torch import Tensor

from kvarn.device import assembly, channels_last, check_blocks, kernel_offsets, processors
from kvarn.errors import ShapeError
from kvarn.kernels import combine, configs, decode, extent
from kvarn.layout import StoreLayout
from kvarn.paged_layout import PagedLayout

UNLIMITED = 1 << 30
"""A window no context reaches."""


def decode_limit(group: int) -> int:
    """Tokens per row that decode takes, with `group` query heads per KV head; rows with more are a chunk."""
    return max(1, configs.DECODE_ROWS // group)


def decode_store(q: Tensor, records: Tensor, tail: Tensor, lengths: Tensor, balance: Tensor, mask: Tensor | None,
                 kv_len: int, scale: float, layout: StoreLayout, out: Tensor) -> Tensor:
    """Attention of q [B', Hq, n, D] over positions 0..kv_len-1 of a contiguous store, into out.

    Args:
        records, tail, lengths, balance: the store (layout.py), after the append of the step's tokens.
        mask: [B', Hq, n, kv_len], bool or additive; None attends everything.
        out: [B', Hq, n, D] contiguous.
    """
    rows, query_heads, n, _ = q.shape
    heads, group = records.shape[1], query_heads // records.shape[1]
    q = channels_last(q)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    hadamard = signs(layout, q.device)
    partial, sums, config = _parts(q, rows, heads, group, n, layout.tiles(kv_len), layout)
    visible = lengths.new_empty((rows, heads, 4), dtype=torch.int32) if mask is not None else lengths
    if mask is not None:
        extent.extent(mask, visible)
    q_b, q_h, q_n, _ = q.stride()
    decode.decode(q, balance, hadamard, records, tail, lengths, lengths, lengths, visible, mask,
                  partial, sums, (q_b, q_n, q_h, layout.record_bytes, 0), records.shape[2], kv_len, group, n, UNLIMITED,
                  scale, 0.0, config, kernel_offsets(layout), False, layout.spec.group, 0, extent.differs(mask, group),
                  assembly(q.device))
    combine.combine(partial, sums, None, hadamard, None, out, (out.stride(0), out.stride(1), out.stride(2)),
                    query_heads, n, *configs.combine(config.splits, layout.head_dim))
    return out


def decode_paged(q: Tensor, cache: Tensor, table: Tensor, starts: Tensor, ends: Tensor, balance: Tensor,
                 max_count: int, max_end: int, scale: float, layout: PagedLayout, out: Tensor, window: int = 0,
                 softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
    """Causal attention of a step's tokens over their rows in a paged store, after their append, into out.

    Query i of row b sees positions 0 .. ends[b] - count[b] + i, where count[b] = starts[b + 1] - starts[b].

    Args:
        q: [n, Hq, D]; tokens from starts[B] on are padding, and out is not written there.
        cache: [blocks, H, record_bytes] uint8, its last dimension contiguous.
        table: [B, N] int32, its last dimension contiguous; starts: [B + 1] int32; ends: [B] int32 (paged.py). A row
            without tokens may have anything in table and ends.
        balance: [H, D] float32.
        max_count, max_end: at least every row's count and end. max_count at most decode_limit(Hq / H).
        out: [n, Hq, D], its last dimension contiguous.
        window: a query sees its own and the window - 1 positions before; 0: all before.
        softcap: scores s become softcap * tanh(s / softcap); 0: they stay.
        sinks: [Hq], logits that share in every softmax and have no value.

    Raises:
        ShapeError: if rows have more tokens than decode takes, q's heads are no multiple of the cache's, or the cache
            is not of this layout.
    """
    check_blocks(cache, layout)
    query_heads, rows, heads = q.shape[1], table.shape[0], cache.shape[1]
    group = query_heads // heads
    if query_heads % heads or max_count > decode_limit(group):
        raise ShapeError(f"{query_heads} query heads over {heads} KV heads, {max_count} tokens a row; valid: a multiple"
                         f", and at most {decode_limit(max(group, 1))} tokens")
    if rows == 0 or max_count == 0 or max_end == 0:
        return out
    q = channels_last(q)
    hadamard = signs(layout, q.device)
    partial, sums, config = _parts(q, rows, heads, group, max_count, layout.tiles(max_end), layout)
    decode.decode(q, balance, hadamard, cache, cache, table, starts, ends, ends, None, partial, sums,
                  (0, q.stride(0), q.stride(1), cache.stride(0), cache.stride(1)), 0, max_end, group, max_count,
                  window or UNLIMITED, scale, softcap, config, kernel_offsets(layout), True, layout.page,
                  layout.spare, max_count > 1, assembly(q.device))
    combine.combine(partial, sums, sinks, hadamard, starts, out, (0, out.stride(1), out.stride(0)), query_heads,
                    max_count, *configs.combine(config.splits, layout.head_dim))
    return out


def _parts(q: Tensor, rows: int, heads: int, group: int, n: int, tiles: int, layout: StoreLayout
           ) -> tuple[Tensor, Tensor, configs.DecodeConfig]:
    """Scratch for what each program finds, and the configuration that says how many there are."""
    config = configs.decode(rows, heads, tiles, group * n, layout, processors(q.device))
    padded = -(-group * n // config.block) * config.block
    partial = q.new_empty((rows, heads, config.splits, padded, layout.head_dim), dtype=torch.float16)
    sums = q.new_empty((rows, heads, config.splits, 2, padded), dtype=torch.float32)
    return partial, sums, config


def signs(layout: StoreLayout, device: torch.device) -> Tensor:
    """The Sylvester-Hadamard matrix of +-1 by which decode_tiles rotates the query and combine_parts the result, made
    once a device.

    Whoever makes a store calls this first (cache.py): what is made inside a CUDA graph, or in the run before one from
    the graph's memory, is not for others.
    """
    size = layout.head_dim * layout.spec.k_bits // 8
    found = _SIGNS.get((size, device))
    if found is None:
        found = _make_signs(size, device)
        if not _capturing(device):
            _SIGNS[size, device] = found
    return found


_SIGNS: dict[tuple[int, torch.device], Tensor] = {}
"""At most one of each size (configs.HEAD_DIMS, configs.BITS) on a device."""


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _make_signs(size: int, device: torch.device) -> Tensor:
    # On the device: hadamard() makes its matrix on the host, and a capture forbids the copy.
    index = torch.arange(size, device=device)
    odd = index[:, None] & index
    for shift in (4, 2, 1):
        odd ^= odd >> shift
    return (1 - 2 * (odd & 1)).half()
