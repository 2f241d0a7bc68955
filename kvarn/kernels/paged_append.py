"""Writing a step's tokens into a paged store: tokens to pages, completed tiles to records (kvarn/paged.py)."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.bits import exchanged
from kvarn.kernels.configs import ROWS_PER_LOOK
from kvarn.kernels.pages import open_from, page_of, row_extent, row_of_token, write_pages
from kvarn.kernels.quantize import round_keys, round_rows, round_values
from kvarn.kernels.quarters import load_rows, select
from kvarn.kernels.rotation import rotate_across, rotate_scaled_across, turned
from kvarn.kernels.tail import scaled, tail_keys, tail_values


@triton.jit(do_not_specialize=["n", "B", "H", "t_b", "steps", "writers", "per"],
            do_not_specialize_on_alignment=["table", "starts", "ends"])
def append_pages(
    k,  # [n, H, D] model dtype, plain frame
    v,  # [n, H, D] model dtype, plain frame
    cache,  # [blocks, H, RECORD] uint8, store frame, in and out
    table,  # [B, N] blocks of each row
    starts,  # [B + 1] where each row's tokens start
    ends,  # [B] each row's length
    balance,  # [H, D] float32
    k_t, k_h, v_t, v_h, c_b, c_h, t_b, n, B, H, steps, writers, per,
    R: tl.constexpr, LOOK: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    E: tl.constexpr, VW: tl.constexpr,
    K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr, WORDS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, PAGE: tl.constexpr, SPARE: tl.constexpr,
):
    """Grid (writers + H * blocks of `per` <= LOOK rows). The first `writers` programs bring R (token, head) pairs each
    into pages. The others each look after a head of `per` rows, and close a row's tile that has older tokens and
    becomes full.

    A page that is read must not be overwritten first. What a step of at most PAGE tokens writes lies beside what its
    row's full tile has there (paged_layout.py); of a longer one that completes such a tile, its closing programs write
    the pages, each its head's.
    """
    if tl.program_id(0) < writers:
        bring(k, v, cache, table, starts, ends, balance, k_t, k_h, v_t, v_h, c_b, c_h, t_b, n, B, H, steps, R, G, Q, VW,
              WORDS, K_SCALE, V_SCALE, PAGE, SPARE)
    else:
        h = (tl.program_id(0) - writers) % H
        origin = (tl.program_id(0) - writers) // H * per
        row = origin + tl.arange(0, LOOK)
        _, first, end = row_extent(starts, ends, row, (row < origin + per) & (row < B))
        full = (end > first) & (first % G > 0) & (first // G < end // G)
        if tl.max(full.to(tl.int32), axis=0) > 0:
            for at in range(0, per):
                r = origin + at
                if tl.max((full & (row == r)).to(tl.int32), axis=0) > 0:
                    close_row(k + h * k_h, v + h * v_h, cache + h * c_h, table + r.to(tl.int64) * t_b, starts, ends, r,
                              balance + h * 4 * Q, k_t, v_t, c_b, R, G, Q, KB, VB, E, VW,
                              K_CODES, V_CODES, SCALARS, CHANNEL, TOKEN, W, M, EXACT, EXACT_AT, WORDS, K_SCALE, V_SCALE,
                              PAGE, SPARE)


@triton.jit
def bring(
    k, v, cache, table, starts, ends, balance, k_t, k_h, v_t, v_h, c_b, c_h, t_b, n, B, H, steps,
    R: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, VW: tl.constexpr, WORDS: tl.constexpr, K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr, PAGE: tl.constexpr, SPARE: tl.constexpr,
):
    """R (token, head) pairs into pages, but for rows whose closing programs do that."""
    pair = tl.program_id(0) * R + tl.arange(0, R)
    token, head = pair // H, pair % H
    b = row_of_token(starts, token, B, steps)
    start, first, end = row_extent(starts, ends, b, token < n)
    position = first + token - start
    later = (end - first > PAGE) & (first % G > 0) & (first // G < end // G)
    some = (token < n) & (token >= start) & (position < end) & (position >= open_from(end, G, PAGE)) & ~later
    if tl.max(some.to(tl.int32), axis=0) > 0:
        write_pages(k, v, token, head, table + b.to(tl.int64) * t_b, position, some, cache, balance, k_t, k_h, v_t, v_h,
                    c_b, c_h, G, Q, VW, WORDS, K_SCALE, V_SCALE, PAGE, SPARE)


@triton.jit
def close_row(
    k, v, cache, blocks, starts, ends, b, scale, k_t, v_t, c_b,
    R: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr,
    VW: tl.constexpr,
    K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr, WORDS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, PAGE: tl.constexpr, SPARE: tl.constexpr,
):
    """Round one head of the tile in which row b's tokens begin: the older ones come from its pages. k, v, cache and the
    balance `scale` are the head's; `blocks` is the row's table.
    """
    start, first, end = row_extent(starts, ends, b, b >= 0)
    tile = first // G
    rec = cache + tl.load(blocks + tile).to(tl.int64) * c_b
    tok, natural = exchanged(tl.arange(0, G)), tl.arange(0, Q)
    row = tile * G + tok - first
    new = row >= 0
    row += start
    page = page_of(cache, blocks, tile, tok, ~new, c_b, PAGE, SPARE)
    y = rotate_across(load_rows(v, v_t, row, natural, new, Q), Q)
    codes, unit = tail_values(page, tok % PAGE, natural, ~new, Q, VW, WORDS, V_SCALE)
    y = select(new, y, scaled(turned(codes, Q), unit[None, :]), 0)
    values, words, exact, found = round_values(rec, y, scale, G, Q, VB, E, V_CODES, SCALARS, W, M)
    x = rotate_scaled_across(load_rows(k, k_t, row, natural, new, Q), scale, Q)
    codes, unit = tail_keys(page, tok % PAGE, natural, ~new, Q, VW, WORDS, K_SCALE)
    x = select(new, x, scaled(turned(codes, Q), unit[None, :]), 0)
    round_keys(rec, x, values, words, exact, found, scale, G, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL, TOKEN, EXACT,
               EXACT_AT)
    if end - first > PAGE:
        tl.debug_barrier()  # the pages have been read
        for at in range(tl.maximum(open_from(end, G, PAGE), first), end, R):
            position = at + tl.arange(0, R)
            write_pages(k, v, start + position - first, position * 0, blocks, position, position < end, cache, scale,
                        k_t, 0, v_t, 0, c_b, 0, G, Q, VW, WORDS, K_SCALE, V_SCALE, PAGE, SPARE)


@triton.jit(do_not_specialize=["B", "t_b"], do_not_specialize_on_alignment=["table", "starts", "ends"])
def fill_blocks(
    k,  # [n, H, D] model dtype, plain frame
    v,  # [n, H, D] model dtype, plain frame
    cache,  # [blocks, H, RECORD] uint8, store frame, out
    table,  # [B, N] blocks of each row
    starts,  # [B + 1] where each row's tokens start
    ends,  # [B] each row's length
    balance,  # [H, D] float32
    k_t, k_h, v_t, v_h, c_b, c_h, t_b, B,
    ASM: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr,
    VW: tl.constexpr, K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr,
    TOKEN: tl.constexpr, W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr,
):
    """Grid (n // G, H): program i rounds the i-th of the tiles whose tokens are all new, counted over the rows."""
    i, h = tl.program_id(0), tl.program_id(1)
    found, tiles_before, total = -1, 0, 0
    for origin in range(0, B, 128):
        row = origin + tl.arange(0, 128)
        _, first, end = row_extent(starts, ends, row, row < B)
        count = tl.where(end > first, tl.maximum(end // G - (first + G - 1) // G, 0), 0)
        after = total + tl.cumsum(count, axis=0)
        hit = (after > i) & (after - count <= i)
        found = tl.maximum(found, tl.max(tl.where(hit, row, -1), axis=0))
        tiles_before += tl.sum(tl.where(hit, after - count, 0), axis=0)
        total += tl.sum(count, axis=0)
    if found >= 0:
        start, first, end = row_extent(starts, ends, found, found >= 0)
        tile = (first + G - 1) // G + i - tiles_before
        rec = cache + tl.load(table + found.to(tl.int64) * t_b + tile).to(tl.int64) * c_b + h * c_h
        round_rows(rec, k + h * k_h, v + h * v_h, k_t, v_t, start + tile * G - first, balance + h * 4 * Q, ASM, G, Q,
                   KB, VB, E, VW, K_CODES, V_CODES, SCALARS, CHANNEL, TOKEN, W, M, EXACT, EXACT_AT)


def append(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, starts: torch.Tensor,
           ends: torch.Tensor, balance: torch.Tensor, per: int, leave_warps: int, fill_warps: int, maxnreg: int | None,
           asm: int, page: int, spare: int, **offsets: int) -> None:
    """Launch append_pages, `per` rows a closing program, and fill_blocks if k, v [n, H, D] can fill a tile; `offsets`
    are configs.offsets of a PagedLayout.
    """
    n, heads, _ = k.shape
    rows = table.shape[0]
    where = (*k.stride()[:2], *v.stride()[:2], *cache.stride()[:2], table.stride(0))
    writers = triton.cdiv(n * heads, 16)
    closers = heads * triton.cdiv(rows, per)
    constants = {name: x for name, x in offsets.items() if name not in ("RECORD", "TAIL")}
    append_pages[(writers + closers,)](
        k, v, cache, table, starts, ends, balance, *where, n, rows, heads, (rows - 1).bit_length(), writers, per,
        R=16, LOOK=ROWS_PER_LOOK, **constants, PAGE=page, SPARE=spare, num_warps=leave_warps)
    if n >= offsets["G"]:
        constants = {name: x for name, x in constants.items() if name not in ("WORDS", "K_SCALE", "V_SCALE")}
        fill_blocks[(n // offsets["G"], heads)](k, v, cache, table, starts, ends, balance, *where, rows, ASM=asm,
                                                **constants, num_warps=fill_warps, maxnreg=maxnreg)
