"""Method "raw" in a paged store: tokens in and out as they are, for lossless runs (kvarn/paged.py)."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.pages import open_from, page_of, row_extent, row_of_token


@triton.jit(do_not_specialize=["t_b", "D"])
def close_raw(
    cache,  # [blocks, H, RECORD] uint8, in and out
    table,  # [B, N] blocks of each row
    starts,  # [B + 1] where each row's tokens start
    ends,  # [B] each row's length
    like,  # any tensor of the cache's dtype
    c_b, c_h, t_b, D,
    BLOCK: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PAGE: tl.constexpr,
    V_PAGE: tl.constexpr, PAGE: tl.constexpr, SPARE: tl.constexpr,
):
    """Grid (H, B): the older tokens of a tile that becomes full, from its pages to its record."""
    h, b = tl.program_id(0), tl.program_id(1)
    _, first, end = row_extent(starts, ends, b, b >= 0)
    tile = first // G
    if (end > first) & (tile < end // G):
        blocks, channel = table + b.to(tl.int64) * t_b, tl.arange(0, BLOCK)
        rec = cache + tl.load(blocks + tile).to(tl.int64) * c_b + h * c_h
        for slot in range(0, first % G):
            page = page_of(cache, blocks, tile, slot, slot >= 0, c_b, PAGE, SPARE) + h * c_h
            for side in tl.static_range(2):
                old = (page + (V_PAGE if side else K_PAGE)).to(like.dtype) + (slot % PAGE) * D + channel
                new = (rec + (V if side else K)).to(like.dtype) + slot * D + channel
                tl.store(new, tl.load(old, mask=channel < D), mask=channel < D)


@triton.jit(do_not_specialize=["t_b", "B", "steps", "D"])
def write_raw(
    k,  # [n, H, D] model dtype
    v,  # [n, H, D] model dtype
    cache,  # [blocks, H, RECORD] uint8, out
    table,  # [B, N] blocks of each row
    starts,  # [B + 1] where each row's tokens start
    ends,  # [B] each row's length
    k_t, k_h, v_t, v_h, c_b, c_h, t_b, B, steps, D,
    BLOCK: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PAGE: tl.constexpr,
    V_PAGE: tl.constexpr, PAGE: tl.constexpr, SPARE: tl.constexpr,
):
    """Grid (n, H): a token into the record of a tile that is full, into the page of one that is open or was last."""
    token, h = tl.program_id(0), tl.program_id(1)
    b = row_of_token(starts, token, B, steps)
    start, first, end = row_extent(starts, ends, b, b >= 0)
    position = first + token - start
    if (token >= start) & (first < end) & (position < end):
        blocks, channel = table + b.to(tl.int64) * t_b, tl.arange(0, BLOCK)
        inside, slot = channel < D, position % G
        x = tl.load(k + token.to(tl.int64) * k_t + h * k_h + channel, mask=inside)
        y = tl.load(v + token.to(tl.int64) * v_t + h * v_h + channel, mask=inside)
        if position // G < end // G:
            rec = cache + tl.load(blocks + position // G).to(tl.int64) * c_b + h * c_h
            tl.store((rec + K).to(k.dtype) + slot * D + channel, x, mask=inside)
            tl.store((rec + V).to(v.dtype) + slot * D + channel, y, mask=inside)
        if position >= open_from(end, G, PAGE):
            page = page_of(cache, blocks, position // G, slot, position >= 0, c_b, PAGE, SPARE) + h * c_h
            tl.store((page + K_PAGE).to(k.dtype) + (slot % PAGE) * D + channel, x, mask=inside)
            tl.store((page + V_PAGE).to(v.dtype) + (slot % PAGE) * D + channel, y, mask=inside)


@triton.jit(do_not_specialize=["t_b", "D"], do_not_specialize_on_alignment=["table", "starts", "ends"])
def read_raw(
    cache,  # [blocks, H, RECORD] uint8
    table,  # [B, N] blocks of each row
    starts,  # [B + 1] where each row's tokens start
    ends,  # [B] each row's length
    offsets,  # [B + 1] where each row's tokens go
    k_out,  # [S, H, D] model dtype, out
    v_out,  # [S, H, D]
    c_b, c_h, t_b, o_t, o_h, D,
    BLOCK: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PAGE: tl.constexpr,
    V_PAGE: tl.constexpr, PAGE: tl.constexpr, SPARE: tl.constexpr,
):
    """Grid (positions, H, B): a token of a row that takes part in the step, from its record or page."""
    position, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, first, end = row_extent(starts, ends, b, b >= 0)
    if (first < end) & (position < end):
        blocks, channel = table + b.to(tl.int64) * t_b, tl.arange(0, BLOCK)
        tile, slot, inside = position // G, position % G, channel < D
        opened = tile == (end - 1) // G
        rec = cache + tl.load(blocks + tile).to(tl.int64) * c_b + h * c_h
        page = page_of(cache, blocks, tile, slot, opened, c_b, PAGE, SPARE) + h * c_h
        out = (tl.load(offsets + b).to(tl.int64) + position) * o_t + h * o_h + channel
        k = tl.where(opened, page + K_PAGE, rec + K).to(k_out.dtype)
        v = tl.where(opened, page + V_PAGE, rec + V).to(v_out.dtype)
        at = tl.where(opened, slot % PAGE, slot) * D + channel
        tl.store(k_out + out, tl.load(k + at, mask=inside), mask=inside)
        tl.store(v_out + out, tl.load(v + at, mask=inside), mask=inside)


def append(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, starts: torch.Tensor,
           ends: torch.Tensor, **offsets: int) -> None:
    """Launch close_raw and write_raw for k, v [n, H, D]; `offsets` are configs.raw_offsets."""
    n, heads, dim = k.shape
    rows, block = table.shape[0], triton.next_power_of_2(dim)
    close_raw[(heads, rows)](cache, table, starts, ends, k, *cache.stride()[:2], table.stride(0), dim, BLOCK=block,
                             **offsets)
    write_raw[(n, heads)](k, v, cache, table, starts, ends, *k.stride()[:2], *v.stride()[:2], *cache.stride()[:2],
                          table.stride(0), rows, (rows - 1).bit_length(), dim, BLOCK=block, **offsets)


def read(cache: torch.Tensor, table: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, to: torch.Tensor,
         k_out: torch.Tensor, v_out: torch.Tensor, max_end: int, **offsets: int) -> None:
    """Launch read_raw: tokens 0..ends[b] - 1 of rows that have new ones to k_out, v_out [S, H, D] from to[b] on."""
    heads, dim = k_out.shape[1:]
    read_raw[(max_end, heads, table.shape[0])](
        cache, table, starts, ends, to, k_out, v_out, *cache.stride()[:2], table.stride(0), *k_out.stride()[:2], dim,
        BLOCK=triton.next_power_of_2(dim), **offsets)
