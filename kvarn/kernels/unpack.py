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


@triton.jit(do_not_specialize=["p_b", "n", "T", "S"])
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
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pos = tl.program_id(0) * R + tl.arange(0, R)
    tile = (tl.program_id(0) * R) // G
    tok = exchanged(pos - tile * G)
    pos = tile * G + tok
    head = b * tl.num_programs(1) + h
    rec, own = records + (head * T + tile) * RECORD, tail + head * TAIL
    row = pos - tl.load(positions + b * p_b)
    fresh = (row >= 0) & (row < n)
    held = tl.maximum(tl.load(lengths + b) - 1, 0) // G == tile
    inside, natural, channel = pos < S, tl.arange(0, Q), exchanged(tl.arange(0, Q))
    at = (head * S + pos)[:, None] * (4 * Q) + natural[None, :]
    if held:
        x = read_tail_keys(own, tok, channel, ~fresh, Q, VW, WORDS, K_SCALE)
    else:
        x = decode_keys(rec, tok, channel, ~fresh, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL, TOKEN, EXACT, EXACT_AT)
    x = rotate_back(x, channel, Q)
    new = load_rows(k + b * k_b + h * k_h, k_t, row, natural, fresh, Q)
    for i in tl.static_range(4):
        scale = tl.load(balance + (h * 4 + i) * Q + natural)
        out = tl.where(fresh[:, None], new[i].to(tl.float32), x[i] / scale[None, :])
        tl.store(k_out + at + i * Q, out.to(k_out.dtype.element_ty), mask=inside[:, None])
    if held:
        y = read_tail_values(own, tok, ~fresh, Q, VW, WORDS, V_SCALE)
    else:
        y = decode_values(rec, tok, natural, ~fresh, G, Q, VB, E, VW, V_CODES, SCALARS, TOKEN, W, M, EXACT,
                          EXACT_AT)
    y = rotate_back(y, natural, Q)
    new = load_rows(v + b * v_b + h * v_h, v_t, row, natural, fresh, Q)
    for i in tl.static_range(4):
        out = tl.where(fresh[:, None], new[i].to(tl.float32), y[i])
        tl.store(v_out + at + i * Q, out.to(v_out.dtype.element_ty), mask=inside[:, None])


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
