"""A chunk's mask in blocks of queries and keys: which of them attention skips, and in which it reads the mask."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

NOTHING, FAINT, SOME, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""What one query sees of a block of keys. FAINT: nothing, unless it sees nothing anywhere, as some entries there are
finite. ALL: every key, and the mask adds nothing."""


@triton.jit
def hides(value, ADDITIVE: tl.constexpr):
    """Whether a mask's entries hide: False, or below half of the least number (transformers has finfo.min for -inf)."""
    if not ADDITIVE:
        return value == 0
    elif value.dtype == tl.float16:
        return value <= -32752.0
    else:
        return value.to(tl.float32) <= -1.7e38


@triton.jit
def find_sights(
    mask,  # [B, Hq, n, S] uint8 or float, any strides
    sights,  # [B, Hq, n, blocks] int8, out: NOTHING to ALL of a block's N keys
    m_b, m_h, m_n, m_s, n, S, blocks,
    ADDITIVE: tl.constexpr, N: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):
    """Grid (groups of R queries, groups of C blocks * Hq, B). No query sees keys from S on."""
    parts = (blocks + C - 1) // C
    part, h, b = tl.program_id(1) % parts, tl.program_id(1) // parts, tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * R + tl.arange(0, R)
    pos = part * (C * N) + tl.arange(0, C * N)
    at = mask + b * m_b + tl.cast(h, tl.int64) * m_h + row.to(tl.int64)[:, None] * m_n
    at += pos.to(tl.int64)[None, :] * m_s
    inside = (row < n)[:, None] & (pos < S)[None, :]
    if ADDITIVE:
        value = tl.load(at, mask=inside, other=float("-inf"))
        level = tl.where(value == 0.0, ALL, tl.where(~hides(value, True), SOME,
                                                     tl.where(value == float("-inf"), NOTHING, FAINT)))
    else:
        level = tl.where(hides(tl.load(at, mask=inside, other=0), False), NOTHING, ALL)
    level = tl.reshape(level, (R, C, N))
    most, least = tl.max(level, axis=2), tl.min(level, axis=2)
    sight = tl.where(least == ALL, ALL, tl.minimum(most, SOME))
    block = part * C + tl.arange(0, C)
    heads = tl.num_programs(1) // parts
    to = sights + ((b * heads + h) * n + row)[:, None] * blocks + block[None, :]
    tl.store(to, sight.to(tl.int8), mask=(row < n)[:, None] & (block < blocks)[None, :])


@triton.jit
def list_blocks(
    sights,  # [B, Hq, n, blocks] int8
    order,  # [B, Hq, rows, blocks] int32, out: blocks that all M queries see plainly first, mixed ones last
    counts,  # [B, Hq, rows, 2] int32, out: how many of these and of those
    n, blocks,
    M: tl.constexpr, C: tl.constexpr,
):
    """Grid (rows of M queries, Hq, B). A block is on neither list if no query sees any of it.

    A query that sees nothing takes the mean of what finite entries hide from it: its FAINT blocks are mixed.
    """
    i, rows = tl.program_id(0), tl.num_programs(0)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    row = i * M + tl.arange(0, M)
    source = sights + (head * n + row)[:, None] * blocks
    order += (head * rows + i) * blocks
    best = tl.zeros([M], tl.int32)
    for start in range(0, blocks, C):
        block = start + tl.arange(0, C)
        inside = (row < n)[:, None] & (block < blocks)[None, :]
        best = tl.maximum(best, tl.max(tl.load(source + block[None, :], mask=inside, other=0).to(tl.int32), axis=1))
    skipped = tl.where(tl.max((best == FAINT).to(tl.int32), axis=0) > 0, NOTHING, FAINT)
    plain, mixed = 0, 0
    for start in range(0, blocks, C):
        block = start + tl.arange(0, C)
        inside = (row < n)[:, None] & (block < blocks)[None, :]
        sight = tl.load(source + block[None, :], mask=inside, other=0).to(tl.int32)
        most, least = tl.max(sight, axis=0), tl.min(tl.where(inside, sight, ALL), axis=0)
        is_plain = (least == ALL) & (block < blocks)
        is_mixed = (most > skipped) & (least < ALL)
        before, between = tl.cumsum(is_plain.to(tl.int32), 0), tl.cumsum(is_mixed.to(tl.int32), 0)
        tl.store(order + plain + before - 1, block, mask=is_plain)
        tl.store(order + blocks - mixed - between, block, mask=is_mixed)
        plain += tl.sum(is_plain.to(tl.int32), axis=0)
        mixed += tl.sum(is_mixed.to(tl.int32), axis=0)
    tl.store(counts + (head * rows + i) * 2, plain)
    tl.store(counts + (head * rows + i) * 2 + 1, mixed)


def list_seen(mask: torch.Tensor, sights: torch.Tensor, order: torch.Tensor, counts: torch.Tensor, queries: int,
              keys: int) -> None:
    """Launch both for blocks of `queries` x `keys`: mask [B, Hq, n, kv_len], sights [B, Hq, n, blocks] int8, order
    [B, Hq, rows, blocks] and counts [B, Hq, rows, 2] int32, these three contiguous.
    """
    rows, heads, n, kv_len = mask.shape
    blocks, per, queries_at_once = sights.shape[3], max(1, 1024 // keys), 16 // mask.element_size()
    find_sights[(triton.cdiv(n, queries_at_once), triton.cdiv(blocks, per) * heads, rows)](
        mask, sights, *mask.stride(), n, kv_len, blocks, ADDITIVE=mask.is_floating_point(), N=keys, R=queries_at_once,
        C=per, num_warps=4)
    list_blocks[(order.shape[2], heads, rows)](sights, order, counts, n, blocks, M=queries, C=32, num_warps=8)
