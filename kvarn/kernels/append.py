"""Opening tiles: a chunk's last tile becomes the open one, its tokens go to the tail. Second half of an append."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.quarters import finite_rows, load_rows, select
from kvarn.kernels.record import decode_keys, decode_values
from kvarn.kernels.rotation import rotate, rotate_scaled
from kvarn.kernels.tail import write_tail


@triton.jit(do_not_specialize=["p_b", "n", "T"], do_not_specialize_on_alignment=["positions"])
def open_tile(
    k,  # [B, H, n, D] model dtype, plain frame
    v,  # [B, H, n, D] model dtype, plain frame
    positions,  # [B or 1, n] int64, consecutive
    records,  # [B, H, T, RECORD] uint8, store frame
    tail,  # [B, H, TAIL] uint8, store frame, out
    lengths,  # [B] int64, out
    before,  # [B] int64: lengths before this append
    balance,  # [H, D] float32
    k_b, k_h, k_t, v_b, v_h, v_t, p_b, n, T,
    R: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr,
    VW: tl.constexpr,
    RECORD: tl.constexpr, TAIL: tl.constexpr, K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr,
    CHANNEL: tl.constexpr, TOKEN: tl.constexpr, W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr,
    EXACT_AT: tl.constexpr, WORDS: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):
    """Grid (H, B). Blocks of R slots: the chunk's tokens are rotated into the tail; slots the chunk does not reach keep
    their tokens if the tile was open already, else come from its record. Runs after quantize.close: nothing here reads
    lengths, and the record of the tile it opens is not written there.
    """
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.load(positions + b * p_b)
    last = first + n - 1
    if (first >= 0) & (last < T.to(tl.int64) * G):
        end = last // G
        held = tl.maximum(tl.load(before + b) - 1, 0) // G == end
        rec = records + ((b * tl.num_programs(0) + h) * T + end) * RECORD
        own = tail + (b * tl.num_programs(0) + h) * TAIL
        low = (tl.maximum(first - end * G, 0)).to(tl.int32)
        high = (last - end * G).to(tl.int32)
        begin_block, end_block = tl.where(held, low // R, 0), tl.where(held, high // R + 1, G // R)
        for block in range(begin_block, end_block):
            tok, natural = block * R + tl.arange(0, R), tl.arange(0, Q)
            fresh = (tok >= low) & (tok <= high)
            row = end * G + tok - first
            x = load_rows(k + b * k_b + h * k_h, k_t, row, natural, fresh, Q)
            x = rotate_scaled(x, balance + h * 4 * Q, natural, Q)
            y = rotate(load_rows(v + b * v_b + h * v_h, v_t, row, natural, fresh, Q), natural, Q)
            x, y = finite_rows(x), finite_rows(y)
            if not held:
                kept = decode_keys(rec, tok, natural, ~fresh, Q, KB, E, VW, K_CODES, SCALARS, CHANNEL, TOKEN, EXACT,
                                   EXACT_AT)
                x = select(fresh, x, kept, 1)
                kept = decode_values(rec, tok, natural, ~fresh, G, Q, VB, E, VW, V_CODES, SCALARS, TOKEN, W, M, EXACT,
                                     EXACT_AT)
                y = select(fresh, y, kept, 1)
            write_tail(own, x, y, tok, fresh | (held == 0), Q, VW, WORDS, K_SCALE, V_SCALE)
        if h == 0:
            tl.store(lengths + b, last + 1)


@triton.jit(do_not_specialize=["p_b", "T", "heads"], do_not_specialize_on_alignment=["positions"])
def write_token(
    k,  # [B, H, 1, D] model dtype, plain frame
    v,  # [B, H, 1, D] model dtype, plain frame
    positions,  # [B or 1, 1] int64
    tail,  # [B, H, TAIL] uint8, store frame, out
    lengths,  # [B] int64, out
    balance,  # [H, D] float32
    k_b, k_h, v_b, v_h, p_b, T, heads,
    R: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, VW: tl.constexpr, TAIL: tl.constexpr, WORDS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):
    """Grid (B,). One token of every head into the tail, R heads at a time; leave_tiles has opened its tile. The only
    program of its row, it also writes the length.
    """
    b = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + b * p_b)
    if (position >= 0) & (position < T.to(tl.int64) * G):
        natural, slot = tl.arange(0, Q), (position % G).to(tl.int32)
        for start in range(0, heads, R):
            head = start + tl.arange(0, R)
            some = head < heads
            x = load_rows(k + b * k_b, k_h, head, natural, some, Q)
            s = load_rows(balance, 4 * Q, head, natural, some, Q)
            x = rotate((x[0].to(tl.float32) * s[0], x[1].to(tl.float32) * s[1], x[2].to(tl.float32) * s[2],
                        x[3].to(tl.float32) * s[3]), natural, Q)
            y = rotate(load_rows(v + b * v_b, v_h, head, natural, some, Q), natural, Q)
            write_tail(tail + (b * heads + head) * TAIL, finite_rows(x), finite_rows(y), slot, some, Q, VW, WORDS,
                       K_SCALE, V_SCALE)
        tl.store(lengths + b, position + 1)


def write(k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, records: torch.Tensor, tail: torch.Tensor,
          lengths: torch.Tensor, balance: torch.Tensor, num_warps: int, **offsets: int) -> None:
    """Launch write_token for k, v [B, H, 1, D] at positions [B or 1, 1]; `offsets` are configs.offsets."""
    rows, heads = k.shape[:2]
    p_b = positions.stride(0) if positions.shape[0] > 1 else 0
    names = ("G", "Q", "VW", "TAIL", "WORDS", "K_SCALE", "V_SCALE")
    write_token[(rows,)](k, v, positions, tail, lengths, balance, *k.stride()[:2], *v.stride()[:2], p_b,
                         records.shape[2], heads, R=16, **{name: offsets[name] for name in names},
                         num_warps=num_warps)


def open_(k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, records: torch.Tensor, tail: torch.Tensor,
          lengths: torch.Tensor, before: torch.Tensor, balance: torch.Tensor, num_warps: int, **offsets: int) -> None:
    """Launch open_tile for k, v [B, H, n, D] at positions [B or 1, n]; `offsets` are configs.offsets."""
    rows, heads, n, _ = k.shape
    p_b = positions.stride(0) if positions.shape[0] > 1 else 0
    open_tile[(heads, rows)](
        k, v, positions, records, tail, lengths, before, balance, *k.stride()[:3], *v.stride()[:3], p_b, n,
        records.shape[2], R=32, **offsets, num_warps=num_warps)
