"""Rows of a paged store back to plain K and V, one after the other: what a chunk attends over (kvarn/paged_cuda.py)."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.bits import exchanged
from kvarn.kernels.pages import page_of, row_extent
from kvarn.kernels.unpack import unpack_block


@triton.jit(do_not_specialize=["t_b", "S"], do_not_specialize_on_alignment=["table", "starts", "ends"])
def unpack_blocks(
    k,  # [n, H, D] model dtype, plain frame: the step's own tokens
    v,  # [n, H, D]
    cache,  # [blocks, H, RECORD] uint8, store frame
    table,  # [B, N] blocks of each row
    starts,  # [B + 1] where each row's tokens start
    ends,  # [B] each row's length
    offsets,  # [B + 1] where each row's tokens go
    balance,  # [H, D] float32
    k_out,  # [S, H, D] model dtype, plain frame, out
    v_out,  # [S, H, D]
    k_t, k_h, v_t, v_h, c_b, c_h, t_b, o_t, o_h, S,
    R: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr,
    VW: tl.constexpr,
    K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr, WORDS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, PAGE: tl.constexpr, SPARE: tl.constexpr,
):
    """Grid (blocks of R tokens, H, B), as unpack_tiles; rows without new tokens are left out, and tokens behind S."""
    h, b = tl.program_id(1), tl.program_id(2)
    start, first, end = row_extent(starts, ends, b, b >= 0)
    if (first < end) & (tl.program_id(0) * R < end):
        blocks = table + b.to(tl.int64) * t_b
        tile = (tl.program_id(0) * R) // G
        tok = exchanged(tl.program_id(0) * R - tile * G + tl.arange(0, R))
        pos = tile * G + tok
        fresh, held = (pos >= first) & (pos < end), tile == (end - 1) // G
        rec = cache + tl.load(blocks + tile).to(tl.int64) * c_b + h * c_h
        page = page_of(cache, blocks, tile, tok, held & (pos < first), c_b, PAGE, SPARE) + h * c_h
        to = tl.load(offsets + b).to(tl.int64) + pos
        inside = (pos < end) & (to < S)
        to = to * o_t + h * o_h
        unpack_block(k + h * k_h, v + h * v_h, k_t, v_t, start + pos - first, fresh, rec, page, tok, tok % PAGE, held,
                     balance + h * 4 * Q, k_out + to, v_out + to, inside, G, Q, KB, VB, E, VW, K_CODES, V_CODES,
                     SCALARS, CHANNEL, TOKEN, W, M, EXACT, EXACT_AT, WORDS, K_SCALE, V_SCALE)


def unpack(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, starts: torch.Tensor,
           ends: torch.Tensor, to: torch.Tensor, balance: torch.Tensor, k_out: torch.Tensor, v_out: torch.Tensor,
           max_end: int, block: int, num_warps: int, page: int, spare: int, **offsets: int) -> None:
    """Launch unpack_blocks: tokens 0..ends[b] - 1 of rows that have new ones to k_out, v_out [S, H, D] from to[b] on;
    `block` tokens a program, a divisor of G; `offsets` are configs.offsets of a PagedLayout.
    """
    constants = {name: x for name, x in offsets.items() if name not in ("RECORD", "TAIL")}
    unpack_blocks[(triton.cdiv(max_end, block), k.shape[1], table.shape[0])](
        k, v, cache, table, starts, ends, to, balance, k_out, v_out, *k.stride()[:2], *v.stride()[:2],
        *cache.stride()[:2], table.stride(0), *k_out.stride()[:2], k_out.shape[0], R=block, **constants,
        PAGE=page, SPARE=spare, num_warps=num_warps)
