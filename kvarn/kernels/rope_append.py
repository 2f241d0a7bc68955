"""A step's rotary embedding, and with it the writing of its keys and values into a paged store.

Channel c < ROT of a head at position p turns with its partner p(c), by the angle of pair i:

    out[c] = x[c] cos(p, i) - x[p(c)] sin(p, i)     if c is the first of its pair, else with a plus

Pairs are halves (i, i + ROT / 2) where NEOX, neighbours (2 i, 2 i + 1) where not; the other channels stay. A row of the
table of angles is [cos of every pair, sin of every pair].
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.configs import ROWS_PER_LOOK
from kvarn.kernels.paged_append import append_pages
from kvarn.kernels.pages import row_extent


@triton.jit
def rope_rows(x, out, position, mask, angles, a_t, D, BLOCK: tl.constexpr, ROT: tl.constexpr, NEOX: tl.constexpr):
    """Rows at x [R] (a pointer to each one's first entry) to those at out [R], where `mask`; angles of its position."""
    channel = tl.arange(0, BLOCK)[None, :]
    if NEOX:
        first, pair = channel < ROT // 2, channel % (ROT // 2)
        partner = tl.where(first, channel + ROT // 2, channel - ROT // 2)
    else:
        first, pair, partner = channel % 2 == 0, channel // 2, channel ^ 1
    inside, turns = mask[:, None] & (channel < D), mask[:, None] & (channel < ROT)
    angle = angles + position.to(tl.int64)[:, None] * a_t + pair
    cos = tl.load(angle, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(angle + ROT // 2, mask=turns, other=0.0).to(tl.float32)
    own = tl.load(x[:, None] + channel, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x[:, None] + partner, mask=turns, other=0.0).to(tl.float32)
    # Named, the fused product is the same wherever this is compiled: two programs may rope the same key.
    tl.store(out[:, None] + channel, tl.fma(own, cos, tl.where(first, -other, other) * sin), mask=inside)


@triton.jit
def rope_pairs(first, x, out, positions, angles, x_t, x_h, a_t, n, H, D, R: tl.constexpr, BLOCK: tl.constexpr,
               ROT: tl.constexpr, NEOX: tl.constexpr):
    """The R (token, head) pairs from `first` on, of x [n, H, D] to out [n, H, D], which is contiguous."""
    pair = (first + tl.arange(0, R)).to(tl.int64)
    token, head = pair // H, pair % H
    mask = token < n
    position = tl.load(positions + token, mask=mask, other=0)
    rope_rows(x + token * x_t + head * x_h, out + pair * D, position, mask, angles, a_t, D, BLOCK, ROT, NEOX)


@triton.jit(do_not_specialize=["n", "HQ", "H", "D", "queries"])
def rope_heads(
    q,  # [n, HQ, D] model dtype
    k,  # [n, H, D] model dtype
    q_out,  # [n, HQ, D] model dtype, out
    k_out,  # [n, H, D] model dtype, out
    positions,  # [n] int64
    angles,  # [positions, ROT] model dtype or float32
    q_t, q_h, k_t, k_h, a_t, n, HQ, H, D, queries,
    R: tl.constexpr, BLOCK: tl.constexpr, ROT: tl.constexpr, NEOX: tl.constexpr,
):
    """Grid (queries + keys): R (token, head) pairs each, the first `queries` programs of q."""
    at = tl.program_id(0)
    if at < queries:
        rope_pairs(at * R, q, q_out, positions, angles, q_t, q_h, a_t, n, HQ, D, R, BLOCK, ROT, NEOX)
    else:
        rope_pairs((at - queries) * R, k, k_out, positions, angles, k_t, k_h, a_t, n, H, D, R, BLOCK, ROT, NEOX)


@triton.jit(do_not_specialize=["n", "B", "HQ", "H", "t_b", "steps", "writers", "closers", "per"],
            do_not_specialize_on_alignment=["table", "starts", "ends"])
def rope_append_pages(
    q,  # [n, HQ, D] model dtype, plain frame
    k,  # [n, H, D] model dtype, plain frame, not roped
    v,  # [n, H, D] model dtype, plain frame
    q_out,  # [n, HQ, D] model dtype, out
    k_out,  # [n, H, D] model dtype, plain frame, roped, out
    positions,  # [n] int64
    angles,  # [positions, ROT] model dtype or float32
    cache,  # [blocks, H, RECORD] uint8, store frame, in and out
    table,  # [B, N] blocks of each row
    starts,  # [B + 1] where each row's tokens start
    ends,  # [B] each row's length
    balance,  # [H, D] float32
    q_t, q_h, k_t, k_h, v_t, v_h, a_t, c_b, c_h, t_b, n, B, HQ, H, steps, writers, closers, per,
    R: tl.constexpr, LOOK: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    E: tl.constexpr, VW: tl.constexpr,
    K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr, WORDS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, PAGE: tl.constexpr, SPARE: tl.constexpr,
    ROT: tl.constexpr, NEOX: tl.constexpr,
):
    """Grid (writers + closers + programs of q): append_pages, of keys that its programs rope first; and R (token, head)
    pairs of q each.

    A program ropes what it will read of k_out: R pairs, or all new tokens of the rows that it closes. Other programs
    write the same there. The barrier makes it visible to the program's other threads, and no other program reads it.
    """
    D: tl.constexpr = 4 * Q
    at = tl.program_id(0)
    if at < writers + closers:
        if at < writers:
            rope_pairs(at * R, k, k_out, positions, angles, k_t, k_h, a_t, n, H, D, R, D, ROT, NEOX)
        else:
            h, origin = (at - writers) % H, (at - writers) // H * per
            for row in range(origin, tl.minimum(origin + per, B)):
                start, first, end = row_extent(starts, ends, row, row >= 0)
                if (end > first) & (first % G > 0) & (first // G < end // G):
                    for low in range(start, start + end - first, R):
                        token = (low + tl.arange(0, R)).to(tl.int64)
                        mask = token < start + end - first
                        position = tl.load(positions + token, mask=mask, other=0)
                        rope_rows(k + token * k_t + h * k_h, k_out + (token * H + h) * D, position, mask, angles, a_t,
                                  D, D, ROT, NEOX)
        tl.debug_barrier()
        append_pages(k_out, v, cache, table, starts, ends, balance, H * D, D, v_t, v_h, c_b, c_h, t_b, n, B, H, steps,
                     writers, per, R, LOOK, G, Q, KB, VB, E, VW, K_CODES, V_CODES, SCALARS, CHANNEL, TOKEN, W, M, EXACT,
                     EXACT_AT, WORDS, K_SCALE, V_SCALE, PAGE, SPARE)
    else:
        rope_pairs((at - writers - closers) * R, q, q_out, positions, angles, q_t, q_h, a_t, n, HQ, D, R, D, ROT, NEOX)


def rope(q: torch.Tensor, k: torch.Tensor, q_out: torch.Tensor, k_out: torch.Tensor, positions: torch.Tensor,
         angles: torch.Tensor, neox: bool) -> None:
    """Launch rope_heads: q [n, HQ, D] to q_out, k [n, H, D] to k_out, which are contiguous."""
    n, heads, dim = k.shape
    queries = triton.cdiv(n * q.shape[1], 16)
    rope_heads[(queries + triton.cdiv(n * heads, 16),)](
        q, k, q_out, k_out, positions, angles, *q.stride()[:2], *k.stride()[:2], angles.stride(0), n, q.shape[1], heads,
        dim, queries, R=16, BLOCK=triton.next_power_of_2(dim), ROT=angles.shape[1], NEOX=neox, num_warps=4)


def append(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_out: torch.Tensor, k_out: torch.Tensor,
           positions: torch.Tensor, angles: torch.Tensor, neox: bool, cache: torch.Tensor, table: torch.Tensor,
           starts: torch.Tensor, ends: torch.Tensor, balance: torch.Tensor, per: int, leave_warps: int, page: int,
           spare: int, **offsets: int) -> None:
    """Launch rope_append_pages, `per` rows a closing program, for a step of which no row brings a whole tile; `offsets`
    are configs.offsets of a PagedLayout.
    """
    n, heads, _ = k.shape
    rows, query_heads = table.shape[0], q.shape[1]
    writers, closers = triton.cdiv(n * heads, 16), heads * triton.cdiv(rows, per)
    constants = {name: x for name, x in offsets.items() if name not in ("RECORD", "TAIL")}
    rope_append_pages[(writers + closers + triton.cdiv(n * query_heads, 16),)](
        q, k, v, q_out, k_out, positions, angles, cache, table, starts, ends, balance, *q.stride()[:2], *k.stride()[:2],
        *v.stride()[:2], angles.stride(0), *cache.stride()[:2], table.stride(0), n, rows, query_heads, heads,
        (rows - 1).bit_length(), writers, closers, per, R=16, LOOK=ROWS_PER_LOOK, **constants, PAGE=page, SPARE=spare,
        ROT=angles.shape[1], NEOX=neox, num_warps=leave_warps)
