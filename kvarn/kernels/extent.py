"""Before a masked decode: which part of the cache each KV head's mask lets it see."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["m_b", "m_h", "m_n", "n", "S", "group"])
def find_extent(
    mask,  # [B, Hq, n, S] uint8 or float, any strides
    extent,  # [B, H, 4] int32, out: first visible position, last + 1, 0 if all between is plainly visible, 0
    m_b, m_h, m_n, m_s, n, S, group,
    ADDITIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid (H, B). With ROWS the mask differs between the queries of a group: their union.

    A position is visible unless its mask is False or below half of float32's least (transformers writes finfo.min for
    -inf). If some query sees nothing, the extent is everything: its result is then whatever the mask makes of it.
    """
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = b * tl.num_programs(0) + h
    source = mask + b * m_b + h * group * m_h
    if ROWS:
        first, last, blind, sparse = S, 0, 0, 1
        for i in range(0, n * group):
            low, high, _ = visible(source + (i % group) * m_h + (i // group) * m_n, m_s, S, ADDITIVE, BLOCK)
            first, last = tl.minimum(first, low), tl.maximum(last, high)
            blind = tl.maximum(blind, (high == 0).to(tl.int32))
    else:
        first, last, plain = visible(source, m_s, S, ADDITIVE, BLOCK)
        blind = (last == 0).to(tl.int32)
        sparse = (plain != last - first).to(tl.int32)
    tl.store(extent + head * 4, tl.where(blind > 0, 0, first))
    tl.store(extent + head * 4 + 1, tl.where(blind > 0, S, last))
    tl.store(extent + head * 4 + 2, tl.where(blind > 0, 1, sparse))


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


def extent(mask: torch.Tensor, extent: torch.Tensor, num_warps: int) -> None:
    """Launch find_extent. mask [B, Hq, n, kv_len] uint8 or floating, extent [B, H, 4]."""
    rows, query_heads, n, kv_len = mask.shape
    heads = extent.shape[1]
    find_extent[(heads, rows)](
        mask, extent, *mask.stride(), n, kv_len, query_heads // heads, ADDITIVE=mask.is_floating_point(),
        ROWS=differs(mask, query_heads // heads), BLOCK=1024, num_warps=num_warps)


def differs(mask: torch.Tensor | None, group: int) -> bool:
    """Whether a [B, Hq, n, kv_len] mask view differs between the query rows of one KV head."""
    return mask is not None and ((group > 1 and mask.stride(1) != 0) or (mask.shape[2] > 1 and mask.stride(2) != 0))
