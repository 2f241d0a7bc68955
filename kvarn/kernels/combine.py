"""The parts of a split-K attention into one: weights from their softmax sums, then out of the store frame."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.rotation import butterfly, signs


@triton.jit(do_not_specialize=["parts", "group", "n"])
def combine_parts(
    partial,  # [B, H, P, MP, D] float32, store frame
    sums,  # [B, H, P, 2, MP] float32: peak and softmax sum of each part
    out,  # [B, Hq, n, D] model dtype, plain frame, contiguous
    parts, group, n,
    P: tl.constexpr, MP: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid (Hq * n, B). With weights w_s = 2^(peak[s] - max peak): out = (sum_s w_s o[s] / sum_s w_s sum[s]) H; a query
    that sees nothing gets zeros.
    """
    query, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    hq, i = query // n, query % n
    row = i * group + hq % group
    head = b * (tl.num_programs(0) // n // group) + hq // group
    every, column = tl.arange(0, P), tl.arange(0, Q)
    peaks = tl.load(sums + (head * parts + every) * 2 * MP + row, mask=every < parts, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.load(sums + ((head * parts + every) * 2 + 1) * MP + row, mask=every < parts, other=0.0)
    total = tl.sum(tl.exp2(peaks - peak) * total, axis=0)
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    y0, y1 = tl.zeros([Q], tl.float32), tl.zeros([Q], tl.float32)
    y2, y3 = tl.zeros([Q], tl.float32), tl.zeros([Q], tl.float32)
    for start in range(0, parts, BLOCK):
        s = start + tl.arange(0, BLOCK)
        w = tl.load(sums + (head * parts + s) * 2 * MP + row, mask=s < parts, other=float("-inf"))
        w = tl.exp2(w - peak)[:, None]
        at = partial + ((head * parts + s) * MP + row)[:, None] * (4 * Q) + column[None, :]
        some = (s < parts)[:, None]
        y0 += tl.sum(tl.load(at, mask=some, other=0.0) * w, axis=0)
        y1 += tl.sum(tl.load(at + Q, mask=some, other=0.0) * w, axis=0)
        y2 += tl.sum(tl.load(at + 2 * Q, mask=some, other=0.0) * w, axis=0)
        y3 += tl.sum(tl.load(at + 3 * Q, mask=some, other=0.0) * w, axis=0)
    h = signs(column, column)
    y0, y1 = tl.sum(h * y0[:, None], axis=0), tl.sum(h * y1[:, None], axis=0)
    y2, y3 = tl.sum(h * y2[:, None], axis=0), tl.sum(h * y3[:, None], axis=0)
    y = butterfly((y0, y1, y2, y3), Q)
    at = out + (b * tl.num_programs(0) + query) * (4 * Q) + column
    for j in tl.static_range(4):
        tl.store(at + j * Q, (y[j] * inverse).to(out.dtype.element_ty))


def combine(partial: torch.Tensor, sums: torch.Tensor, out: torch.Tensor, num_warps: int) -> None:
    """Launch combine_parts: partial [B, H, P, MP, D] and sums [B, H, P, 2, MP] into out [B, Hq, n, D]."""
    _, heads, parts, padded, dim = partial.shape
    rows, query_heads, n, _ = out.shape
    combine_parts[(query_heads * n, rows)](
        partial, sums, out, parts, query_heads // heads, n, P=triton.next_power_of_2(parts), MP=padded, Q=dim // 4,
        BLOCK=min(64, triton.next_power_of_2(parts)), num_warps=num_warps)
