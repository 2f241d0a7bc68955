"""Closing tiles: whatever a write leaves behind becomes records. First half of an append (append.py is the second)."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.bits import exchanged
from kvarn.kernels.quarters import finite4, load_rows, select
from kvarn.kernels.record import decode_keys, decode_values, encode_keys, encode_values
from kvarn.kernels.rotation import rotate, rotate_scaled
from kvarn.kernels.tail import read_tail_keys, read_tail_values, write_tail


@triton.jit(do_not_specialize=["p_b", "n", "T"])
def close_tiles(
    k,  # [B, H, n, D] model dtype, plain frame
    v,  # [B, H, n, D] model dtype, plain frame
    positions,  # [B or 1, n] int64, consecutive
    records,  # [B, H, T, RECORD] uint8, store frame
    tail,  # [B, H, TAIL] uint8, store frame
    lengths,  # [B] int64
    before,  # [B] int64, out: lengths as this launch found them
    balance,  # [H, D] float32
    k_b, k_h, k_t, v_b, v_h, v_t, p_b, n, T,
    FULL: tl.constexpr, ONE: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    E: tl.constexpr, VW: tl.constexpr,
    RECORD: tl.constexpr, TAIL: tl.constexpr, K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr,
    CHANNEL: tl.constexpr, TOKEN: tl.constexpr, W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr,
    EXACT_AT: tl.constexpr, WORDS: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):
    """With FULL, grid (tiles a chunk can complete, H, B): round those tiles that the chunk fills from end to end.
    Without, grid (2, H, B): program 0 rounds the open tile if the chunk lies elsewhere, program 1 the chunk's first
    tile if it completes that but does not fill it. Nothing here writes the tail, so that every program reads it as it
    was; but with ONE (n = 1, grid (1, H, B)) the only program of a tail reads the tile it opens into it.
    Formulas: kvarn/append.py (semantics), kvarn/closed.py (record).
    """
    i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + b)
    first = tl.load(positions + b * p_b)
    last = first + n - 1
    begin, end, opened = first // G, last // G, tl.maximum(length - 1, 0) // G
    if FULL:
        tile = begin + i
        active = (tile < end) & (tile * G >= first)
    else:
        if h + i == 0:
            tl.store(before + b, length)
        tile = tl.where(i == 0, opened, begin)
        elsewhere = (length > 0) & ((opened < begin) | (opened > end))
        active = ((i == 0) & elsewhere) | ((i > 0) & (begin < end) & (begin * G < first))
    head = b * tl.num_programs(1) + h
    inside = (first >= 0) & (last < T.to(tl.int64) * G)
    if active & inside:
        rec, own = records + (head * T + tile) * RECORD, tail + head * TAIL
        tok, natural, channel = exchanged(tl.arange(0, G)), tl.arange(0, Q), exchanged(tl.arange(0, Q))
        row = tile * G + tok - first
        fresh = (row >= 0) & (row < n) & (FULL | (i > 0))
        y = rotate(load_rows(v + b * v_b + h * v_h, v_t, row, natural, fresh, Q), natural, Q)
        if not FULL:
            x = rotate_scaled(load_rows(k + b * k_b + h * k_h, k_t, row, natural, fresh, Q), balance + h * 4 * Q,
                              channel, Q)
            if tile == opened:
                y = select(fresh, y, read_tail_values(own, tok, ~fresh, Q, VW, WORDS, V_SCALE))
                x = select(fresh, x, read_tail_keys(own, tok, channel, ~fresh, Q, VW, WORDS, K_SCALE))
            else:
                y = select(fresh, y, decode_values(rec, tok, natural, ~fresh, G, Q, VB, E, VW, V_CODES, SCALARS, TOKEN,
                                                   W, M, EXACT, EXACT_AT))
                x = select(fresh, x, decode_keys(rec, tok, channel, ~fresh, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL,
                                                 TOKEN, EXACT, EXACT_AT))
            tl.debug_barrier()  # a reopened record is read whole before any of it is written
        scales, exact = encode_values(rec, finite4(y), tok, G, Q, VB, E, VW, V_CODES, SCALARS, W, M, EXACT, EXACT_AT)
        tl.debug_barrier()  # encode_keys reads the exact tokens' values back
        if FULL:
            x = rotate_scaled(load_rows(k + b * k_b + h * k_h, k_t, row, natural, fresh, Q), balance + h * 4 * Q,
                              channel, Q)
        encode_keys(rec, finite4(x), scales, exact, tok, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL, TOKEN, EXACT,
                    EXACT_AT)
    if ONE:  # noqa: SIM102  (a constexpr and a run-time condition)
        if (opened != end) & inside:
            tl.debug_barrier()  # the tail has been read
            opening, into = records + (head * T + end) * RECORD, tail + head * TAIL
            for block in range(0, G // 16):
                slot, columns = block * 16 + tl.arange(0, 16), tl.arange(0, Q)
                every = slot >= 0
                kept_k = decode_keys(opening, slot, columns, every, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL, TOKEN,
                                     EXACT, EXACT_AT)
                kept_v = decode_values(opening, slot, columns, every, G, Q, VB, E, VW, V_CODES, SCALARS, TOKEN, W, M,
                                       EXACT, EXACT_AT)
                write_tail(into, kept_k, kept_v, slot, every, Q, VW, WORDS, K_SCALE, V_SCALE)


def close(k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, records: torch.Tensor, tail: torch.Tensor,
          lengths: torch.Tensor, before: torch.Tensor, balance: torch.Tensor, num_warps: int, maxnreg: int | None,
          **offsets: int) -> None:
    """Launch close_tiles for k, v [B, H, n, D] at positions [B or 1, n], twice if that can fill a tile; `offsets` are
    configs.offsets.
    """
    rows, heads, n, _ = k.shape
    p_b = positions.stride(0) if positions.shape[0] > 1 else 0
    arguments = (k, v, positions, records, tail, lengths, before, balance, *k.stride()[:3], *v.stride()[:3], p_b, n,
                 records.shape[2])
    close_tiles[(1 if n == 1 else 2, heads, rows)](*arguments, FULL=False, ONE=n == 1, **offsets, num_warps=num_warps)
    if n >= offsets["G"]:
        close_tiles[(n // offsets["G"], heads, rows)](*arguments, FULL=True, ONE=False, **offsets, num_warps=num_warps,
                                                         maxnreg=maxnreg)
