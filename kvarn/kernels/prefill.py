"""Attention of a chunk of queries over plain K and V under any mask: a wide flash attention that skips blocks."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.configs import PrefillConfig
from kvarn.kernels.sight import LOG2E

HIDDEN = tl.constexpr(-1e30)
"""The least finite number a mask adds: any score is lost in it, and none of those that divide it is infinite."""


@triton.constexpr_function
def _meet(second: bool) -> str:
    return ("{ .reg .pred p, q; .reg .b32 t; .reg .f32 f; mov.u32 t, %tid.x; setp.ge.u32 p, t, 128; "
            f"setp.ge.u32 q, t, 1024; mov.u32 t, 0; @{'' if second else '!'}p bar.red.popc.u32 t, 8, 256, q; "
            "cvt.rn.f32.u32 f, t; add.f32 $0, $1, f; }")


@triton.jit
def meet(c, SECOND: tl.constexpr, TURNS: tl.constexpr):
    """c, when the two warp groups have met: where the second calls this before a product and the first after it, the
    second's product comes after the first's, and beside its softmax. Else both ask for the matrix units at once, and
    then both leave them alone.

    The barrier counts threads of a number that no program has: a zero that has to be waited for.
    """
    if TURNS:
        return tl.inline_asm_elementwise(_meet(SECOND), "=f,f", [c], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return c


@triton.jit(do_not_specialize=["o_b", "o_h", "n", "group", "blocks"])
def attend_chunk(
    q,  # [B, Hq, n, D] float16 or bfloat16, any strides over rows, heads and tokens
    key,  # [B, H, S, D] the same
    value,  # [B, H, S, D]
    mask,  # [B, Hq, n, S] uint8 or float, any strides
    order,  # [B, Hq, n / M, blocks] int32 (blocks.py), strides o_b, o_h
    counts,  # [B, Hq, n / M, 2] int32, like order
    out,  # [B, Hq, n, D], out
    q_b, q_h, q_n, m_b, m_h, m_n, m_s, o_b, o_h, n, S, group, blocks, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, ADDITIVE: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Grid (n / M * group, H, B): heads of a group side by side, for the keys they share; the last queries, which see
    most, first.

    Blocks of N keys that all M queries see plainly, then those where the mask decides. A hidden key has no part in the
    result whatever it holds, and a query gets NaN if it sees a value that is not finite.
    """
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tl.num_programs(0) // group
    i, asked = rows - 1 - tl.program_id(0) // group, h * group + tl.program_id(0) % group
    row, d, col = i * M + tl.arange(0, M), tl.arange(0, D), tl.arange(0, N)
    at = row.to(tl.int64)
    x = tl.load(q + b * q_b + asked * q_h + (at * q_n)[:, None] + d[None, :], mask=(row < n)[:, None], other=0.0)
    head = (b * tl.num_programs(1) + h) * S * D
    k_at = key + head + col[:, None] * D + d[None, :]
    v_at = value + head + col[:, None] * D + d[None, :]
    step, c = N * D, scale * LOG2E
    row_of_lists = b * o_b + asked * o_h + i
    listed = order + row_of_lists * blocks
    plain, mixed = tl.load(counts + row_of_lists * 2), tl.load(counts + row_of_lists * 2 + 1)

    peak, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    j = tl.load(listed)
    for t in tl.range(0, plain):
        k, v = tl.load(k_at + j.to(tl.int64) * step), tl.load(v_at + j.to(tl.int64) * step)
        j = tl.load(listed + tl.minimum(t + 1, plain - 1))  # a turn ahead: addresses of loads do not wait for it
        unit = meet(c, True, TURNS)
        s = tl.dot(x, tl.trans(k))
        unit = meet(unit, False, TURNS)
        new = tl.maximum(peak, tl.max(s, axis=1) * unit)
        p, alpha = tl.exp2(s * unit - new[:, None]), tl.exp2(peak - new)
        total = total * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        peak = new

    SEEN: tl.constexpr = -32752.0 * LOG2E if mask.dtype.element_ty == tl.float16 else HIDDEN / 2
    peak /= c  # from here on scores without their scale: a difference of two is taken before it is scaled, or a fused
    # multiply-add would make more of the rounding of a hidden key's than a softmax can bear
    few = tl.arange(0, P)
    m_at = mask + b * m_b + asked * m_h + (at * m_n)[:, None]
    k_at = key + head + few[:, None] * D + d[None, :]
    v_at = value + head + few[:, None] * D + d[None, :]
    for t in tl.range(0, mixed * (N // P), num_stages=2):
        j = tl.load(listed + blocks - 1 - t // (N // P))
        pos = (j * N + t % (N // P) * P + few).to(tl.int64)
        inside = (pos < S)[:, None]
        first = (j * N + t % (N // P) * P).to(tl.int64) * D
        k, v = tl.load(k_at + first, mask=inside, other=0.0), tl.load(v_at + first, mask=inside, other=0.0)
        asks = (row < n)[:, None] & (pos < S)[None, :]
        if ADDITIVE:
            shift = tl.load(m_at + pos[None, :] * m_s, mask=asks, other=float("-inf")).to(tl.float32)
            # The bound: entries that hide stay finite, and where nothing else is there, they weigh the same.
            shift = tl.where(shift == float("-inf"), shift, tl.maximum(shift, HIDDEN) * LOG2E)
        else:
            shift = tl.where(tl.load(m_at + pos[None, :] * m_s, mask=asks, other=0) != 0, 0.0, float("-inf"))
        k_fine, v_fine = tl.abs(k.to(tl.float32)) < float("inf"), tl.abs(v.to(tl.float32)) < float("inf")
        told = tl.where(tl.min((k_fine & v_fine).to(tl.int32), axis=1) > 0, 0.0, float("nan"))
        s = tl.dot(x, tl.trans(tl.where(k_fine, k, 0.0)), shift / c)
        new = tl.maximum(peak, tl.max(s, axis=1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p, alpha = tl.exp2((s - safe[:, None]) * c), tl.exp2((peak - safe) * c)
        total = total * alpha + tl.sum(p + tl.where(s > SEEN / c, told[None, :], 0.0), axis=1)
        acc = tl.dot(p.to(v.dtype), tl.where(v_fine, v, 0.0), acc * alpha[:, None])
        peak = new

    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    to = out + ((b * tl.num_programs(1) * group + asked) * n + at)[:, None] * D + d[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(row < n)[:, None])


def attend(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, order: torch.Tensor,
           counts: torch.Tensor, out: torch.Tensor, scale: float, config: PrefillConfig) -> None:
    """Launch attend_chunk: q [B, Hq, n, D], key and value [B, H, S, D] and out contiguous, mask [B, Hq, n, S] uint8 or
    floating; order and counts of the same blocks as `config` has, of one row or head where the mask has one for all.
    """
    rows, query_heads, n, dim = q.shape
    heads, group = key.shape[1], query_heads // key.shape[1]
    _, listed_heads, parts, blocks = order.shape
    o_h = parts if listed_heads > 1 else 0
    o_b = listed_heads * parts if order.shape[0] > 1 else 0
    attend_chunk[(parts * group, heads, rows)](
        q, key, value, mask, order, counts, out, *q.stride()[:3], *mask.stride(), o_b, o_h, n, key.shape[2], group,
        blocks, scale, D=dim, M=config.queries, N=config.keys, P=config.part, ADDITIVE=mask.is_floating_point(),
        TURNS=config.turns, num_warps=config.num_warps, num_stages=config.num_stages)
