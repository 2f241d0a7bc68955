"""Before a masked decode: which part of the cache each KV head's mask lets it see."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.blocks import hides

AT_ONCE = 8192
"""Bytes of the mask that a program asks for at a time: 16 of each thread of 16 warps."""

STAGES = 4
"""How many such loads are on their way."""


@triton.jit(do_not_specialize=["n", "H", "group"])
def find_extent(
    mask,  # [B, Hq, n, S] uint8 or float, any strides
    extent,  # [B, H, 4] int32, out: first visible position, last + 1, 0 if all between is plainly visible, 0
    m_b, m_h, m_n, m_s, n, S, H, group,
    ADDITIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """Grid (H, B), or (1, B) for a mask that all heads share. With ROWS > 0 the mask differs between the queries of a
    group: their union, ROWS of them at a time.

    A position is visible unless the mask hides it (blocks.py). If some query sees nothing, the extent is everything:
    its result is then whatever the mask makes of it.
    """
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    R: tl.constexpr = ROWS if ROWS > 0 else 1
    source = mask + b * m_b + h * group.to(tl.int64) * m_h
    heads = tl.where(m_h != 0, group, 1)
    queries = n * heads if ROWS > 0 else 1
    first, last, least, plain = S, 0, S, 0
    for start in range(0, queries, R):
        query = start + tl.arange(0, R)
        row = source + (query % heads).to(tl.int64) * m_h + (query // heads).to(tl.int64) * m_n
        low = tl.full([R, BLOCK], 0x7FFFFFFF, tl.int32)
        high, even = tl.zeros([R, BLOCK], tl.int32), tl.zeros([R, BLOCK], tl.int32)
        for begin in tl.range(0, S, BLOCK, num_stages=STAGES):
            pos = begin + tl.arange(0, BLOCK)
            inside = (query < queries)[:, None] & (pos < S)[None, :]
            value = tl.load(row[:, None] + pos.to(tl.int64)[None, :] * m_s, mask=inside, other=0)
            seen = inside & ~hides(value, ADDITIVE)
            low = tl.where(seen, tl.minimum(low, pos[None, :]), low)
            high = tl.where(seen, pos[None, :] + 1, high)
            even += (seen & ((value == 0) if ADDITIVE else seen)).to(tl.int32)
        highest = tl.max(high, axis=1)
        first, last = tl.minimum(first, tl.min(tl.min(low, axis=1), axis=0)), tl.maximum(last, tl.max(highest, axis=0))
        least = tl.minimum(least, tl.min(tl.where(query < queries, highest, S), axis=0))
        plain += tl.sum(tl.sum(even, axis=1), axis=0)
    sparse = 1 if ROWS > 0 else (plain != last - first).to(tl.int32)
    blind = least == 0
    for head in range(h, H, tl.num_programs(0)):  # itself, or all heads
        to = extent + (b * H + head) * 4
        tl.store(to, tl.where(blind, 0, first))
        tl.store(to + 1, tl.where(blind, S, last))
        tl.store(to + 2, tl.where(blind, 1, sparse))


def extent(mask: torch.Tensor, extent: torch.Tensor, num_warps: int = 16) -> None:
    """Launch find_extent. mask [B, Hq, n, kv_len] uint8 or floating, extent [B, H, 4]."""
    rows, query_heads, n, kv_len = mask.shape
    heads, shared = extent.shape[1], mask.stride(1) == 0
    group = query_heads // heads
    queries = n * (1 if shared else group) if differs(mask, group) else 0
    at_once = min(8, triton.next_power_of_2(queries)) if queries else 0
    find_extent[(1 if shared else heads, rows)](
        mask, extent, *mask.stride(), n, kv_len, heads, group, ADDITIVE=mask.is_floating_point(), ROWS=at_once,
        BLOCK=AT_ONCE // (mask.element_size() * max(1, at_once)), STAGES=STAGES, num_warps=num_warps)


def differs(mask: torch.Tensor | None, group: int) -> bool:
    """Whether a [B, Hq, n, kv_len] mask view differs between the query rows of one KV head."""
    return mask is not None and ((group > 1 and mask.stride(1) != 0) or (mask.shape[2] > 1 and mask.stride(2) != 0))
