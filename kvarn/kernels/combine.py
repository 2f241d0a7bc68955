"""The parts of a split-K attention into one: weights from their softmax sums, then out of the store frame."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.rotation import signs
from kvarn.kernels.sight import LOG2E


@triton.jit(do_not_specialize=["sinks", "starts", "parts", "n"])
def combine_parts(
    partial,  # [B, H, P, MP, D] float16, store frame: attention of each part; zeros if it is empty
    sums,  # [B, H, P, 2, MP] float32: highest score of each part, its sum of 2^(score - highest)
    sinks,  # [Hq] float32 or model dtype: a logit that takes weight and has no value; unused without SINKS
    hadamard,  # [S, S] float16, +-1, S >= Q: the Sylvester-Hadamard matrix
    starts,  # [B + 1] int32: where a row's tokens start in out; unused if not paged
    out,  # [B, Hq, n, D] model dtype, plain frame, contiguous; paged: [tokens, Hq, D], any strides over both
    o_b, o_h, o_n, parts, n,
    GROUP: tl.constexpr, PAGED: tl.constexpr, SINKS: tl.constexpr, MP: tl.constexpr, Q: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (Hq, n, B). With w_s = sum_s 2^highest_s: out = (sum_s w_s partial[s] / (sum_s w_s + e^sink)) H; a query
    that sees nothing gets zeros, a token that a row does not have is not written.
    """
    hq, i, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = i * GROUP + hq % GROUP
    head = b * (tl.num_programs(0) // GROUP) + hq // GROUP
    channel, column, four = tl.arange(0, 4 * Q), tl.arange(0, Q), tl.arange(0, 4)
    peak, total = float("-inf"), 0.0
    if SINKS:
        peak, total = tl.load(sinks + hq).to(tl.float32) * LOG2E, 1.0
    target, asked = out + b * o_b + i * o_n + hq * o_h, n
    if PAGED:
        begin = tl.load(starts + b)
        asked = tl.load(starts + b + 1) - begin
        target = out + (begin + i).to(tl.int64) * o_n + hq * o_h
    y, h = tl.zeros([4 * Q], tl.float32), tl.zeros([Q, Q], tl.float16)
    for start in range(0, parts, BLOCK):  # nothing here waits for whether the row has the token
        s = start + tl.arange(0, BLOCK)
        here = sums + (head * parts + s) * 2 * MP + row
        high = tl.load(here, mask=s < parts, other=float("-inf"))
        w = tl.load(here + MP, mask=s < parts, other=0.0)
        x = tl.load(partial + ((head * parts + s) * MP + row)[:, None] * (4 * Q) + channel[None, :],
                    mask=(s < parts)[:, None], other=0.0)
        h = tl.load(hadamard + column[:, None] * S + column[None, :])  # here, so that nothing waits for it alone
        new = tl.maximum(peak, tl.max(high, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        w, old = w * tl.exp2(high - safe), tl.exp2(peak - safe)
        peak, total, y = new, total * old + tl.sum(w, axis=0), y * old + tl.sum(x * w[:, None], axis=0)
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    # H = H_4 x H_Q. A product has sixteen rows: the four quarters four times, for the four that come out.
    y = tl.reshape(tl.broadcast_to(tl.reshape(y * inverse, (1, 4, Q)), (4, 4, Q)), (16, Q))
    upper = y.to(tl.float16)
    y = tl.dot(upper, h, tl.dot((y - upper.to(tl.float32)).to(tl.float16), h))
    y = tl.sum(tl.reshape(y, (4, 4, Q)) * (signs(four, four) * (4 * Q) ** -0.5)[:, :, None], axis=1)
    tl.store(target + four[:, None] * Q + column[None, :], y.to(out.dtype.element_ty), mask=i < asked)


def combine(partial: torch.Tensor, sums: torch.Tensor, sinks: torch.Tensor | None, hadamard: torch.Tensor,
            starts: torch.Tensor | None, out: torch.Tensor, strides: tuple[int, int, int], query_heads: int, n: int,
            block: int, num_warps: int) -> None:
    """Launch combine_parts: partial [B, H, P, MP, D] and sums [B, H, P, 2, MP] into out, strides over row, head, token.

    starts: with it, out is [tokens, Hq, D] and row b's tokens are starts[b] .. starts[b + 1] - 1.
    """
    rows, heads, parts, padded, dim = partial.shape
    combine_parts[(query_heads, n, rows)](
        partial, sums, sums if sinks is None else sinks, hadamard, sums if starts is None else starts, out, *strides,
        parts, n, GROUP=query_heads // heads, PAGED=starts is not None, SINKS=sinks is not None, MP=padded, Q=dim // 4,
        S=hadamard.shape[0], BLOCK=block, num_warps=num_warps)
