"""Before a decode: the query into the store frame, and which part of the cache its mask lets it see."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.quarters import load_rows
from kvarn.kernels.rotation import rotate

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["m_b", "m_h", "m_n", "n", "S", "group"])
def prepare_rows(
    q,  # [B, Hq, n, D] model dtype, plain frame
    balance,  # [H, D] float32
    mask,  # [B, Hq, n, S] uint8 or float, any strides; unused without MASKED
    rotated,  # [B, H, MP, D] float16, store frame times scale * log2(e), out; row i * group + g is query i of head g
    extent,  # [B, H, 4] int32, out: first visible position, last + 1, 1 if all between is plainly visible, 0
    q_b, q_h, q_n, m_b, m_h, m_n, m_s, n, S, group, scale,
    R: tl.constexpr, MP: tl.constexpr, Q: tl.constexpr, MASKED: tl.constexpr, ADDITIVE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid (H, B). q' = (q / balance) H * scale * log2(e). With ROWS the mask differs between the queries of a group.

    A position is visible unless its mask is False or below half of float32's least (transformers writes finfo.min for
    -inf). If some query sees nothing, the extent is everything: its result is then whatever the mask makes of it.
    """
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = b * tl.num_programs(0) + h
    row, column = tl.arange(0, R), tl.arange(0, Q)
    used = row < n * group
    x = load_rows(q + b * q_b, 1, (row % group + h * group) * q_h + (row // group) * q_n, column,
                  used, Q)
    at = balance + h * 4 * Q + column
    x = rotate((x[0].to(tl.float32) / tl.load(at)[None, :], x[1].to(tl.float32) / tl.load(at + Q)[None, :],
                x[2].to(tl.float32) / tl.load(at + 2 * Q)[None, :], x[3].to(tl.float32) / tl.load(at + 3 * Q)[None, :]),
               column, Q)
    out = rotated + head * MP * 4 * Q + row[:, None] * (4 * Q) + column[None, :]
    for i in tl.static_range(4):
        y = tl.minimum(tl.maximum(x[i] * (scale * LOG2E), -65504.0), 65504.0)
        tl.store(out + i * Q, y.to(tl.float16), mask=(row < MP)[:, None])

    first, last, dense = 0, S, 1
    if MASKED:
        first, last, dense = S, 0, 0
        source = mask + b * m_b + h * group * m_h
        plain_total, blind = 0, 0
        if ROWS:
            for i in range(0, n * group):
                low, high, _ = visible(source + (i % group) * m_h + (i // group) * m_n, m_s, S, ADDITIVE, BLOCK)
                first, last = tl.minimum(first, low), tl.maximum(last, high)
                blind = tl.maximum(blind, (high == 0).to(tl.int32))
        else:
            first, last, plain_total = visible(source, m_s, S, ADDITIVE, BLOCK)
            blind = (last == 0).to(tl.int32)
            dense = (plain_total == last - first).to(tl.int32)
        first, last = tl.where(blind > 0, 0, first), tl.where(blind > 0, S, last)
        dense = tl.where(blind > 0, 0, dense)
    tl.store(extent + head * 4, first)
    tl.store(extent + head * 4 + 1, last)
    tl.store(extent + head * 4 + 2, dense)


@triton.jit
def visible(mask, m_s, S, ADDITIVE: tl.constexpr, BLOCK: tl.constexpr):
    """Over one mask row: first visible position (S if none), last + 1 (0 if none), positions that add nothing."""
    first = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    plain = tl.zeros([BLOCK], tl.int32)
    for start in range(0, S, BLOCK):
        pos = start + tl.arange(0, BLOCK)
        value = tl.load(mask + pos.to(tl.int64) * m_s, mask=pos < S, other=0)
        if ADDITIVE:
            seen = (value.to(tl.float32) > -1.7e38) if mask.dtype.element_ty != tl.float16 else (value > -32752.0)
            even = value == 0.0
        else:
            seen = value != 0
            even = seen
        seen, even = seen & (pos < S), even & (pos < S)
        first = tl.where(seen, tl.minimum(first, pos), first)
        last = tl.where(seen, pos + 1, last)
        plain += even.to(tl.int32)
    return tl.minimum(tl.min(first, axis=0), S), tl.max(last, axis=0), tl.sum(plain, axis=0)


def prepare(q: torch.Tensor, balance: torch.Tensor, mask: torch.Tensor | None, rotated: torch.Tensor,
            extent: torch.Tensor, kv_len: int, scale: float, num_warps: int) -> None:
    """Launch prepare_rows. q [B, Hq, n, D]; mask None or a [B, Hq, n, kv_len] view, uint8 or floating."""
    rows, query_heads, n, dim = q.shape
    heads, padded = rotated.shape[1], rotated.shape[2]
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    prepare_rows[(heads, rows)](
        q, balance, q if mask is None else mask, rotated, extent, *q.stride()[:3], *strides, n, kv_len,
        query_heads // heads, scale, R=max(padded, 16), MP=padded, Q=dim // 4, MASKED=mask is not None,
        ADDITIVE=mask is not None and mask.is_floating_point(), ROWS=differs(mask, query_heads // heads),
        BLOCK=1024, num_warps=num_warps)


def differs(mask: torch.Tensor | None, group: int) -> bool:
    """Whether a [B, Hq, n, kv_len] mask view differs between the query rows of one KV head."""
    return mask is not None and ((group > 1 and mask.stride(1) != 0) or (mask.shape[2] > 1 and mask.stride(2) != 0))
