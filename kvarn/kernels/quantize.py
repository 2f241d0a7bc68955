"""Closing tiles: whatever a write leaves behind becomes records. First half of an append (append.py is the second)."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.bits import exchanged
from kvarn.kernels.configs import ROWS_PER_LOOK
from kvarn.kernels.encode import encode_keys, encode_values, exact_columns, find_exact, write_exact
from kvarn.kernels.flight import together
from kvarn.kernels.quarters import load_rows, select
from kvarn.kernels.record import decode_keys, decode_values
from kvarn.kernels.rotation import rotate_across, rotate_scaled_across, turned
from kvarn.kernels.sums import finite_tile
from kvarn.kernels.tail import scaled, tail_keys, tail_values, write_tail


@triton.jit
def round_rows(
    rec,  # the tile's record, uint8, out
    k, v,  # one head's [n, D] model dtype, plain frame
    k_t, v_t, origin,  # the row of k and v where the tile begins
    scale,  # [D] float32: the head's balance
    ASM: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr,
    VW: tl.constexpr, K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr,
    TOKEN: tl.constexpr, W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr,
):
    """Round a tile that is all new. Values first, then keys: only one of them is in registers."""
    tok, natural = exchanged(tl.arange(0, G)), tl.arange(0, Q)
    y = rotate_across(together(load_rows(v, v_t, origin + tok, natural, tok >= 0, Q), ASM), Q)
    values, words, exact, found = round_values(rec, y, scale, G, Q, VB, E, V_CODES, SCALARS, W, M)
    x = rotate_scaled_across(together(load_rows(k, k_t, origin + tok, natural, tok >= 0, Q), ASM), scale, Q)
    round_keys(rec, x, values, words, exact, found, scale, G, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL, TOKEN, EXACT,
               EXACT_AT)


@triton.jit
def round_values(
    rec, y, scale, G: tl.constexpr, Q: tl.constexpr, VB: tl.constexpr, E: tl.constexpr, V_CODES: tl.constexpr,
    SCALARS: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
):
    """The values' part of a record, of y, a tile as encode.py has it: nothing of what reading its keys takes. Returns
    what round_keys needs.
    """
    y, norm = finite_tile(y, scale)
    exact, found = find_exact(norm, G, Q, E)
    values = exact_columns(y, found, scale, G, Q, E)
    return values, encode_values(rec, y, norm, exact, scale, G, Q, VB, V_CODES, SCALARS, W, M), exact, found


@triton.jit
def round_keys(
    rec, x, values, words, exact, found, scale, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, E: tl.constexpr,
    VW: tl.constexpr, K_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr,
    EXACT: tl.constexpr, EXACT_AT: tl.constexpr,
):
    """The rest of a record, of its keys x, a tile as encode.py has it."""
    x, norm = finite_tile(x, scale)
    write_exact(rec, found, exact_columns(x, found, scale, G, Q, E), values, Q, E, VW, SCALARS, EXACT, EXACT_AT)
    encode_keys(rec, x, norm, words, exact, scale, G, Q, KB, K_CODES, CHANNEL, TOKEN)


@triton.jit(do_not_specialize=["p_b", "n", "T"], do_not_specialize_on_alignment=["positions"])
def fill_tiles(
    k,  # [B, H, n, D] model dtype, plain frame
    v,  # [B, H, n, D] model dtype, plain frame
    positions,  # [B or 1, n] int64, consecutive
    records,  # [B, H, T, RECORD] uint8, store frame, out
    balance,  # [H, D] float32
    k_b, k_h, k_t, v_b, v_h, v_t, p_b, n, T,
    ASM: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr,
    VW: tl.constexpr, RECORD: tl.constexpr, K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr,
    CHANNEL: tl.constexpr, TOKEN: tl.constexpr, W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr,
    EXACT_AT: tl.constexpr,
):
    """Grid (tiles a chunk can complete, H, B): round the tiles that the chunk fills from end to end and goes beyond."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.load(positions + b * p_b)
    last = first + n - 1
    tile = (first + G - 1) // G + tl.program_id(0)
    if (tile < last // G) & (first >= 0) & (last < T.to(tl.int64) * G):
        rec = records + ((b * tl.num_programs(1) + h) * T + tile) * RECORD
        round_rows(rec, k + b * k_b + h * k_h, v + b * v_b + h * v_h, k_t, v_t, tile * G - first, balance + h * 4 * Q,
                   ASM, G, Q, KB, VB, E, VW, K_CODES, V_CODES, SCALARS, CHANNEL, TOKEN, W, M, EXACT, EXACT_AT)


@triton.jit(do_not_specialize=["p_b", "n", "T", "rows", "per"], do_not_specialize_on_alignment=["positions"])
def leave_tiles(
    k,  # [B, H, n, D] model dtype, plain frame
    v,  # [B, H, n, D] model dtype, plain frame
    positions,  # [B or 1, n] int64, consecutive
    records,  # [B, H, T, RECORD] uint8, store frame
    tail,  # [B, H, TAIL] uint8, store frame
    lengths,  # [B] int64
    before,  # [B] int64, out: lengths as this launch found them
    balance,  # [H, D] float32
    k_b, k_h, k_t, v_b, v_h, v_t, p_b, n, T, rows, per,
    LOOK: tl.constexpr, ONE: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    E: tl.constexpr, VW: tl.constexpr,
    RECORD: tl.constexpr, TAIL: tl.constexpr, K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr,
    CHANNEL: tl.constexpr, TOKEN: tl.constexpr, W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr,
    EXACT_AT: tl.constexpr, WORDS: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):
    """Grid (2, H, blocks of `per` <= LOOK rows): program 0 rounds the open tile if the chunk lies elsewhere, program 1
    the chunk's first tile if it completes that but does not fill it. Nothing here writes the tail, so that every
    program reads it as it was; but with ONE (n = 1, grid (1, H, blocks)) the only program of a tail reads the tile it
    opens into it. Most writes leave no tile: a look at all rows at once finds that out.
    Formulas: kvarn/append.py (semantics), kvarn/closed.py (record).
    """
    i, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    origin = tl.program_id(2) * per
    row = origin + tl.arange(0, LOOK)
    own_row = (row < origin + per) & (row < rows)
    length = tl.load(lengths + row, mask=own_row, other=0)
    first = tl.load(positions + row.to(tl.int64) * p_b, mask=own_row, other=-1)
    if h + i == 0:
        tl.store(before + row, length, mask=own_row)
    last = first + n - 1
    begin, end, opened = first // G, last // G, tl.maximum(length - 1, 0) // G
    inside = (first >= 0) & (last < T.to(tl.int64) * G)
    leaves = (length > 0) & ((opened < begin) | (opened > end))
    if ONE:
        leaves = (opened != end) & inside
    else:
        leaves = inside & ((leaves & (i == 0)) | ((i > 0) & (begin < end) & (begin * G < first)))
    if tl.max(leaves.to(tl.int32), axis=0) > 0:
        for at in range(0, per):
            b = (origin + at).to(tl.int64)
            if tl.max((leaves & (row == b)).to(tl.int32), axis=0) > 0:
                head, start = b * tl.num_programs(1) + h, tl.load(positions + b * p_b)
                opened_at, own = tl.maximum(tl.load(lengths + b) - 1, 0) // G, tail + head * TAIL
                if (i > 0) | (tl.load(lengths + b) > 0):
                    tile = tl.where(i == 0, opened_at, start // G)
                    rec = records + (head * T + tile) * RECORD
                    leave_tile(k + b * k_b + h * k_h, v + b * v_b + h * v_h, start, rec, own, tile, tile == opened_at,
                               i > 0, balance + h * 4 * Q, k_t, v_t, n, G, Q, KB, VB, E, VW, K_CODES, V_CODES, SCALARS,
                               CHANNEL, TOKEN, W, M, EXACT, EXACT_AT, WORDS, K_SCALE, V_SCALE)
                if ONE:
                    tl.debug_barrier()  # the tail has been read
                    open_record(records + (head * T + start // G) * RECORD, own, G, Q, KB, VB, E, VW, K_CODES, V_CODES,
                                SCALARS, CHANNEL, TOKEN, W, M, EXACT, EXACT_AT, WORDS, K_SCALE, V_SCALE)


@triton.jit
def leave_tile(
    k, v, first, rec, own, tile, held, has_new, scale, k_t, v_t, n,
    G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr, VW: tl.constexpr,
    K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr, WORDS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):
    """Round one head's tile: its tokens from `first` on from k, v [n, D] if it has new ones, the others from the tail
    `own` if the tail holds it, else from its record `rec`.
    """
    tok, natural = exchanged(tl.arange(0, G)), tl.arange(0, Q)
    row = tile * G + tok - first
    fresh = (row >= 0) & (row < n) & has_new
    y = rotate_across(load_rows(v, v_t, row, natural, fresh, Q), Q)
    if held:
        codes, unit = tail_values(own, tok, natural, ~fresh, Q, VW, WORDS, V_SCALE)
        y = select(fresh, y, scaled(turned(codes, Q), unit[None, :]), 0)
    else:
        old = decode_values(rec, tok, natural, ~fresh, G, Q, VB, E, VW, V_CODES, SCALARS, TOKEN, W, M, EXACT, EXACT_AT)
        y = select(fresh, y, turned(old, Q), 0)
    tl.debug_barrier()  # what is read of the record is read before it is written
    values, words, exact, found = round_values(rec, y, scale, G, Q, VB, E, V_CODES, SCALARS, W, M)
    x = rotate_scaled_across(load_rows(k, k_t, row, natural, fresh, Q), scale, Q)
    if held:
        codes, unit = tail_keys(own, tok, natural, ~fresh, Q, VW, WORDS, K_SCALE)
        x = select(fresh, x, scaled(turned(codes, Q), unit[None, :]), 0)
    else:
        old = decode_keys(rec, tok, natural, ~fresh, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL, TOKEN, EXACT, EXACT_AT)
        x = select(fresh, x, turned(old, Q), 0)
    tl.debug_barrier()  # likewise
    round_keys(rec, x, values, words, exact, found, scale, G, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL, TOKEN, EXACT,
               EXACT_AT)


@triton.jit
def open_record(
    rec, own, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr, VW: tl.constexpr,
    K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr, WORDS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):
    """The tokens of a record into the tail `own`."""
    for block in range(0, G // 16):
        slot, natural = block * 16 + tl.arange(0, 16), tl.arange(0, Q)
        every = slot >= 0
        k = decode_keys(rec, slot, natural, every, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL, TOKEN, EXACT, EXACT_AT)
        v = decode_values(rec, slot, natural, every, G, Q, VB, E, VW, V_CODES, SCALARS, TOKEN, W, M, EXACT, EXACT_AT)
        write_tail(own, k, v, slot, every, Q, VW, WORDS, K_SCALE, V_SCALE)


def close(k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, records: torch.Tensor, tail: torch.Tensor,
          lengths: torch.Tensor, before: torch.Tensor, balance: torch.Tensor, per: int, leave_warps: int,
          fill_warps: int, maxnreg: int | None, asm: int, **offsets: int) -> None:
    """Launch leave_tiles for k, v [B, H, n, D] at positions [B or 1, n], `per` rows a program, and fill_tiles if n can
    fill a tile; `offsets` are configs.offsets.
    """
    rows, heads, n, _ = k.shape
    p_b = positions.stride(0) if positions.shape[0] > 1 else 0
    where = (*k.stride()[:3], *v.stride()[:3], p_b, n, records.shape[2])
    leave_tiles[(1 if n == 1 else 2, heads, triton.cdiv(rows, per))](
        k, v, positions, records, tail, lengths, before, balance, *where, rows, per,
        LOOK=ROWS_PER_LOOK, ONE=n == 1, **offsets, num_warps=leave_warps)
    if n >= offsets["G"]:
        record_only = {name: x for name, x in offsets.items() if name not in ("TAIL", "WORDS", "K_SCALE", "V_SCALE")}
        fill_tiles[(n // offsets["G"], heads, rows)](k, v, positions, records, balance, *where, ASM=asm, **record_only,
                                                     num_warps=fill_warps, maxnreg=maxnreg)
