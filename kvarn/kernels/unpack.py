"""A store back to plain K and V: what a long chunk attends over (kvarn/cuda.py)."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.bits import exchanged
from kvarn.kernels.quarters import load_rows
from kvarn.kernels.record import decode_keys, decode_values
from kvarn.kernels.rotation import rotate_back
from kvarn.kernels.tail import read_tail_keys, read_tail_values


@triton.jit(do_not_specialize=["p_b", "n", "T", "S"], do_not_specialize_on_alignment=["positions"])
def unpack_tiles(
    k,  # [B, H, n, D] model dtype, plain frame: the chunk's own tokens
    v,  # [B, H, n, D]
    positions,  # [B or 1, n] int64, consecutive
    records,  # [B, H, T, RECORD] uint8, store frame
    tail,  # [B, H, TAIL] uint8, store frame
    lengths,  # [B] int64
    balance,  # [H, D] float32
    k_out,  # [B, H, S, D] model dtype, plain frame, out
    v_out,  # [B, H, S, D]
    k_b, k_h, k_t, v_b, v_h, v_t, p_b, n, T, S,
    R: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr,
    VW: tl.constexpr,
    RECORD: tl.constexpr, TAIL: tl.constexpr, K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr,
    CHANNEL: tl.constexpr, TOKEN: tl.constexpr, W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr,
    EXACT_AT: tl.constexpr, WORDS: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):
    """Grid (blocks of R tokens, H, B). K = (K_hat H) / balance, V = V_hat H; the chunk's own tokens stand unrounded."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tile = (tl.program_id(0) * R) // G
    tok = exchanged(tl.program_id(0) * R - tile * G + tl.arange(0, R))
    pos = tile * G + tok
    head = b * tl.num_programs(1) + h
    row = pos - tl.load(positions + b * p_b)
    held = tl.maximum(tl.load(lengths + b) - 1, 0) // G == tile
    to = (head * S + pos) * (4 * Q)
    unpack_block(k + b * k_b + h * k_h, v + b * v_b + h * v_h, k_t, v_t, row, (row >= 0) & (row < n),
                 records + (head * T + tile) * RECORD, tail + head * TAIL, tok, tok, held, balance + h * 4 * Q,
                 k_out + to, v_out + to, pos < S, G, Q, KB, VB, E, VW, K_CODES, V_CODES, SCALARS, CHANNEL, TOKEN, W, M,
                 EXACT, EXACT_AT, WORDS, K_SCALE, V_SCALE)


@triton.jit
def unpack_block(
    k, v, k_t, v_t, row, fresh, rec, tail, tok, slot, held, scale, k_out, v_out, inside,
    G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr, VW: tl.constexpr,
    K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr, WORDS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):
    """Tokens tok [R] of one head's tile to k_out, v_out [R] (pointers to rows) where `inside`: rows `row` of k, v
    [n, D] where `fresh`, else from `slot` [R] of the tail (or pages, [R]) if that holds the tile, else from its record.
    """
    natural, channel = tl.arange(0, Q), exchanged(tl.arange(0, Q))
    inside = inside[:, None]
    if held:
        x = read_tail_keys(tail, slot, channel, ~fresh, Q, VW, WORDS, K_SCALE)
    else:
        x = decode_keys(rec, tok, channel, ~fresh, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL, TOKEN, EXACT, EXACT_AT)
    x = rotate_back(x, channel, Q)
    new = load_rows(k, k_t, row, natural, fresh, Q)
    for i in tl.static_range(4):
        out = tl.where(fresh[:, None], new[i].to(tl.float32), x[i] / tl.load(scale + i * Q + natural)[None, :])
        tl.store(k_out[:, None] + natural[None, :] + i * Q, out.to(k_out.dtype.element_ty), mask=inside)
    if held:
        y = read_tail_values(tail, slot, natural, ~fresh, Q, VW, WORDS, V_SCALE)
    else:
        y = decode_values(rec, tok, natural, ~fresh, G, Q, VB, E, VW, V_CODES, SCALARS, TOKEN, W, M, EXACT,
                          EXACT_AT)
    y = rotate_back(y, natural, Q)
    new = load_rows(v, v_t, row, natural, fresh, Q)
    for i in tl.static_range(4):
        out = tl.where(fresh[:, None], new[i].to(tl.float32), y[i])
        tl.store(v_out[:, None] + natural[None, :] + i * Q, out.to(v_out.dtype.element_ty), mask=inside)


def unpack(k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, records: torch.Tensor, tail: torch.Tensor,
           lengths: torch.Tensor, balance: torch.Tensor, k_out: torch.Tensor, v_out: torch.Tensor, block: int,
           num_warps: int, **offsets: int) -> None:
    """Launch unpack_tiles: k_out, v_out [B, H, S, D] contiguous; `block` tokens a program, a divisor of G."""
    rows, heads, n, _ = k.shape
    length = k_out.shape[2]
    p_b = positions.stride(0) if positions.shape[0] > 1 else 0
    unpack_tiles[(triton.cdiv(length, block), heads, rows)](
        k, v, positions, records, tail, lengths, balance, k_out, v_out, *k.stride()[:3], *v.stride()[:3], p_b, n,
        records.shape[2], length, R=block, **offsets, num_warps=num_warps)
