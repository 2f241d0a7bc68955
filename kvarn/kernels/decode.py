"""Attention of a step's few tokens over packed tiles: split-K, scales in the small operand, tokens on the M side."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.bits import codes, e4m3_pair, from_e4m3, from_e4m3_bytes, half_pair, halves, of_half
from kvarn.kernels.configs import DecodeConfig
from kvarn.kernels.decode_parts import (
    advance,
    attend_words,
    fold,
    from_codes,
    in_codes,
    load_exact,
    load_words,
    of_lanes,
    of_warps,
    stacked,
    tile_at,
)
from kvarn.kernels.flight import together
from kvarn.kernels.query import query_planes
from kvarn.kernels.sight import LOG2E, bias, soften

BATCH = tl.constexpr(16)
"""Tiles whose zero points, mean directions and exact rows are multiplied at once: one matrix instruction's depth."""

OPEN_TILES = tl.constexpr(2)
"""Closed tiles that take as long as the open one: what a row's first program has fewer of."""


@triton.jit(do_not_specialize=["table", "starts", "lengths", "table_b", "m_b", "m_h", "m_n", "m_s", "T", "S", "n",
                               "window"])
def decode_tiles(
    q,  # [B, Hq, n, D] model dtype, plain frame, any strides over tokens and heads; paged: [tokens, Hq, D]
    balance,  # [H, D] float32
    hadamard,  # [DK, DK] float16, +-1: the Sylvester-Hadamard matrix
    records,  # [B, H, T, RECORD] uint8, store frame; paged: [blocks, H, RECORD], any strides over blocks and heads
    tail,  # [B, H, TAIL] uint8, store frame; unused if paged
    table,  # [B, N] int32: blocks of a row's tiles, then of its open one's pages; unused if not paged
    starts,  # [B + 1] int32: where a row's tokens start in q; unused if not paged
    lengths,  # [B] int64: stored tokens; paged: int32
    extent,  # [B, H, 4] int32 (extent.py); unused without MASKED
    mask,  # [B, Hq, n, S] uint8 or float, any strides; unused without MASKED
    partial,  # [B, H, splits, blocks * MP, D] float16, store frame, out: the part's attention, zeros if it is empty
    sums,  # [B, H, splits, 2, blocks * MP] float32, out: the part's highest score and its sum of 2^(score - highest)
    q_b, q_n, q_h, r_t, r_h, table_b, m_b, m_h, m_n, m_s, T, S, n, blocks, window, scale, cap,
    GROUP: tl.constexpr, PAGED: tl.constexpr, PAGE: tl.constexpr, SPARE: tl.constexpr, MP: tl.constexpr,
    MASKED: tl.constexpr, ADDITIVE: tl.constexpr, ROWS: tl.constexpr, SOFTCAP: tl.constexpr, ASM: tl.constexpr,
    OPEN: tl.constexpr, STEP: tl.constexpr, WARPS: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr,
    VB: tl.constexpr, E: tl.constexpr, VW: tl.constexpr, RECORD: tl.constexpr, TAIL: tl.constexpr,
    K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr, WORDS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):
    """Grid (splits, H * blocks, B). A program attends its share of a row's tiles; the first has the open one as well.

        scores = (codes (q * ks) + q . kz) * kt      out = codes (p * vt) - c * sum(p * vt) + m (p . w) + exact (p[at])

    (kvarn/closed.py). The last two terms and q . kz are gathered over BATCH tiles into one product each. Query
    i * GROUP + g of a group is token i of the step and query head g; MP of them make a block.
    """
    split, h, b = tl.program_id(0), tl.program_id(1) // blocks, tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(0)
    D: tl.constexpr = 4 * Q
    PK: tl.constexpr = 8 // KB
    PV: tl.constexpr = 8 // VB
    DK: tl.constexpr = D // PK
    DV: tl.constexpr = D // PV
    STEPS: tl.constexpr = G // STEP
    head = b * (tl.num_programs(1) // blocks) + h

    # What is visible to some query: first..last - 1. To every query, unless `sparse`: plain_first..plain_last - 1.
    stored, asked, sparse, first, last, least = tl.load(lengths + b), n, 0, 0, S, 0
    q_at = q + b * q_b
    if PAGED:
        begin_q = tl.load(starts + b)
        asked = tl.minimum(tl.load(starts + b + 1) - begin_q, n)
        q_at = q + begin_q.to(tl.int64) * q_n
        last = tl.where(asked > 0, stored, 0)
        least = last - asked + 1
        first = tl.maximum(least - window, 0)
    if MASKED:
        first, last = tl.load(extent + head * 4), tl.load(extent + head * 4 + 1)
        sparse = tl.load(extent + head * 4 + 2)
    plain_first, plain_last = first, last
    if ROWS and not MASKED:
        plain_first, plain_last = last - window, least

    base = records + (h.to(tl.int64) * r_h if PAGED else head * T * r_t)
    row_table = table + b * table_b
    begin, end = first // G, (last + G - 1) // G
    opened = (tl.maximum(stored - 1, 0) // G).to(tl.int32)
    held = ((opened >= begin) & (opened < end)).to(tl.int32)
    skip = tl.where(held > 0, opened, end)
    work = end - begin + held * (OPEN_TILES - 1)
    low = tl.maximum(work * split // splits - held * OPEN_TILES, 0)
    high = tl.maximum(work * (split + 1) // splits - held * OPEN_TILES, 0)

    mp = tl.program_id(1) % blocks * MP + tl.arange(0, MP)
    out = (head * splits + split) * blocks * MP
    if (low >= high) & ((split > 0) | (held == 0)):  # more splits than a short row has tiles for
        tl.store(partial + (out + mp)[:, None] * D + tl.arange(0, D)[None, :], tl.zeros([MP, D], tl.float16))
        tl.store(sums + out * 2 + mp, float("-inf"))
        tl.store(sums + (out * 2 + blocks * MP) + mp, 0.0)
        return

    dk, dv, channel, row = tl.arange(0, DK), tl.arange(0, DV), tl.arange(0, D), tl.arange(0, BATCH)
    places = tile_at(row + (begin + low), skip)
    if PAGED:  # as early as can be: what a batch loads waits for it
        places = tl.load(row_table + places, mask=row < high - low, other=0)
    qs = query_planes(q_at, (mp // GROUP) * q_n + (mp % GROUP + h * GROUP) * q_h, mp < asked * GROUP,
                      balance + h * D, hadamard, scale * LOG2E, PK, DK, KB, ASM)
    peak, total = tl.full([MP], float("-inf"), tl.float32), tl.zeros([16 * WARPS, MP], tl.float32)
    sum_pv = tl.zeros([16, MP], tl.float32)
    acc = ()
    for _ in tl.static_range(PV):
        acc = acc + (tl.zeros([DV, MP], tl.float32),)
    if (split == 0) & (held > 0):
        for part in tl.range(0, tl.minimum(last - opened * G, G), OPEN, num_stages=1):
            slot = part + tl.arange(0, OPEN)
            pos = opened * G + slot
            known = (pos >= first) & (pos < last)
            home = tail + head * TAIL + slot * 0
            if PAGED:
                block = tl.load(row_table + opened + SPARE - slot // PAGE, mask=known, other=0)
                home, slot = base + block.to(tl.int64) * r_t, slot % PAGE
            k_scale = tl.load((home + K_SCALE).to(tl.pointer_type(tl.float16)) + slot, mask=known, other=0.0)
            v_scale = tl.load((home + V_SCALE).to(tl.pointer_type(tl.float16)) + slot, mask=known, other=0.0)
            shift = bias(mask, m_b, m_h, m_n, m_s, GROUP, n, blocks, opened * G + part, tl.arange(0, OPEN), first, last,
                         least, window, sparse, MP, MASKED, ADDITIVE, ROWS)
            words = (home + WORDS).to(tl.pointer_type(tl.int16)) + slot * D
            keys, values = load_words(words, known, PK, DK, PV, DV)
            peak, total, sum_pv, acc = attend_words(
                together(keys, ASM), together(values, ASM), known, k_scale.to(tl.float32), v_scale.to(tl.float32),
                shift, qs, cap, peak, total, sum_pv, acc, SOFTCAP, ASM, WARPS, KB, VW)
    acc = in_codes(acc, VB)

    pair, dk_pair, step = tl.arange(0, STEP // 2), tl.arange(0, DK // 2), tl.arange(0, STEP)
    step = of_half(step % (STEP // 2), step // (STEP // 2))
    v_at = V_CODES // 2 + dv[:, None] * (G // 2) + pair[None, :]
    warp_row = tl.arange(0, BATCH * WARPS) % BATCH
    ones = tl.full([16, STEP // 2], 1, tl.int16)
    for start in range(low, high, BATCH):
        tiles = tile_at(begin + start + row, skip)
        stop = tl.minimum(start + BATCH, high)
        some = row < stop - start
        recs = base + places.to(tl.int64) * r_t
        units = tl.load((recs + SCALARS).to(tl.pointer_type(tl.float32)), mask=some, other=0.0)
        zero, channels = tl.zeros([BATCH, MP], tl.float32), ()
        for i in tl.static_range(PK):
            channels = channels + (tl.load((recs[:, None] + CHANNEL).to(tl.pointer_type(tl.int32)) + i * DK
                                           + dk[None, :], mask=some[:, None], other=0),)
        channels, kz = together(channels, ASM), ()
        for i in tl.static_range(PK):
            kz = kz + halves(half_pair(channels[i])[1])
        kz = together(kz, ASM)
        for i in tl.static_range(PK - 1, -1, -1):  # each plane of qs is 2^KB less than the one before
            zero = tl.dot(kz[2 * i + 1], qs[1][i], tl.dot(kz[2 * i], qs[0][i], zero * 2.0**KB))
        zero *= 2.0**-24
        pw = tl.zeros([BATCH * WARPS, MP], tl.float32)
        zeros = tl.sum(tl.where((row == 0)[:, None], zero, 0.0), axis=0)[None, :]
        for part in range(start * STEPS, stop * STEPS):
            t, c = part // STEPS, part % STEPS * STEP
            tile = tile_at(begin + t, skip)
            place = tl.sum(tl.where(row == t - start, places, 0), axis=0) if PAGED else tile
            rec = base + place.to(tl.int64) * r_t
            unit = tl.sum(tl.where(row == t - start, units, 0.0), axis=0)
            ks = ()
            for i in tl.static_range(PK):
                ks = ks + (half_pair(tl.load((rec + CHANNEL).to(tl.pointer_type(tl.int32)) + i * DK + dk))[0],)
            folded = fold(qs, ks, ASM)
            kb = tl.load((rec + K_CODES).to(tl.pointer_type(tl.int16)) + (c + step)[:, None] * (DK // 2)
                         + dk_pair[None, :])
            s = tl.zeros([STEP, MP], tl.float32) + zeros
            for i in tl.static_range(PK):
                s = tl.dot(codes(kb, 0, (2**KB - 1) << (i * KB), ASM), folded[2 * i], s)
                s = tl.dot(codes(kb, 1, (2**KB - 1) << (i * KB), ASM), folded[2 * i + 1], s)
            word = tl.load((rec + TOKEN).to(tl.pointer_type(tl.int32)) + c + step)
            s = soften(s * (half_pair(word)[0].to(tl.float32) * 2.0 ** (16 + KB))[:, None], cap, SOFTCAP)
            if E > 0:  # an exact token's kt is -0.0, the only one with a sign: its turn comes below
                s += tl.where(word & 0x8000 != 0, float("-inf"), 0.0)[:, None]
            pos = tile * G + c
            if (pos < plain_first) | (pos + STEP > plain_last) | (sparse != 0):
                s += bias(mask, m_b, m_h, m_n, m_s, GROUP, n, blocks, pos, step, first, last, least, window, sparse, MP,
                          MASKED, ADDITIVE, ROWS)
            peak, safe, alpha = advance(peak, s, WARPS)
            p = tl.exp2(s - safe[None, :])
            if VB > 2:
                vt = half_pair(word)[1].to(tl.float32) * unit
                w = from_e4m3(tl.load(rec + W + c + step).to(tl.int32))
            else:
                vt, w = e4m3_pair(word, ASM)
                vt *= unit
            pv = tl.split(tl.permute(tl.reshape((p * vt[:, None]).to(tl.float16), (2, STEP // 2, MP)), (1, 2, 0)))
            vb = tl.load(rec.to(tl.pointer_type(tl.int16)) + (v_at + c // 2))
            new = ()
            for i in tl.static_range(PV):
                x = tl.dot(codes(vb, 0, (2**VB - 1) << (i * VB), ASM), pv[0], acc[i] * alpha[None, :])
                new = new + (tl.dot(codes(vb, 1, (2**VB - 1) << (i * VB), ASM), pv[1], x),)
            acc = new
            sum_pv = tl.dot(codes(ones, 0, 1, ASM), pv[0], sum_pv * alpha[None, :])
            sum_pv = tl.dot(codes(ones, 0, 1, ASM), pv[1], sum_pv)
            total = total * alpha[None, :] + of_lanes(p, WARPS)
            mine = of_warps(of_lanes(p * w[:, None], WARPS), WARPS)
            pw = pw * alpha[None, :] + tl.where((warp_row == t - start)[:, None], mine, 0.0)
            zeros = tl.sum(tl.where((row == (part + 1) // STEPS - start)[:, None], zero, 0.0), axis=0)[None, :]
        w_unit = tl.load((recs + SCALARS).to(tl.pointer_type(tl.float32)) + 1, mask=some, other=0.0)
        m = ()
        for i in tl.static_range(PV):
            m = m + (tl.load(recs[None, :] + M + (i * DV + dv)[:, None], mask=some[None, :], other=0),)
        if E > 0:
            at, k_scale, v_scale, keys, values = load_exact(recs, some, 0, PK, DK, PV, DV, SCALARS, EXACT, EXACT_AT)
        places = tile_at(row + (begin + start + BATCH), skip)
        if PAGED:
            places = tl.load(row_table + places, mask=row < high - start - BATCH, other=0)
        m = together(m, ASM)
        if E > 0:
            keys, values = together(keys, ASM), together(values, ASM)
        pw = tl.sum(tl.reshape(pw, (WARPS, BATCH, MP)), axis=0) * 2.0**-8
        ranks, acc, means = from_codes(acc, VB), (), ()
        for i in tl.static_range(PV):
            means = means + ((from_e4m3_bytes(m[i], ASM) * (256.0 * w_unit)[None, :]).to(tl.float16),)
        means = together(means, ASM)
        for i in tl.static_range(PV):
            acc = acc + (tl.dot(means[i], pw.to(tl.float16), ranks[i]),)
        for e in tl.static_range(E):
            if e > 0:  # the first of each tile came with m
                at, k_scale, v_scale, keys, values = load_exact(recs, some, e, PK, DK, PV, DV, SCALARS, EXACT, EXACT_AT)
                keys, values = together(keys, ASM), together(values, ASM)
            shift = bias(mask, m_b, m_h, m_n, m_s, GROUP, n, blocks, 0, (tiles * G + at).to(tl.int64), first, last,
                         least, window, sparse, MP, MASKED, ADDITIVE, ROWS)
            peak, total, sum_pv, acc = attend_words(keys, values, some, k_scale, v_scale, shift, qs, cap, peak, total,
                                                    sum_pv, acc, SOFTCAP, ASM, WARPS, KB, VW)
        acc = in_codes(acc, VB)

    total = tl.sum(total, axis=0)
    center = tl.max(sum_pv, axis=0) * (2.0**24 * (2**VB - 1) / 2)
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    x = (stacked(from_codes(acc, VB)) - center[None, :]) * inverse[None, :]
    x = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    tl.store(partial + (out + mp)[None, :] * D + channel[:, None], x, mask=(mp < n * GROUP)[None, :])
    tl.store(sums + out * 2 + mp, peak)
    tl.store(sums + (out * 2 + blocks * MP) + mp, total)


def decode(q: torch.Tensor, balance: torch.Tensor, hadamard: torch.Tensor, records: torch.Tensor, tail: torch.Tensor,
           table: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, extent: torch.Tensor,
           mask: torch.Tensor | None, partial: torch.Tensor, sums: torch.Tensor,
           strides: tuple[int, int, int, int, int], tiles: int, kv_len: int, group: int, n: int, window: int,
           scale: float, cap: float, config: DecodeConfig, offsets: dict[str, int], paged: bool, page: int, spare: int,
           rows_differ: bool, asm: int) -> None:
    """Launch decode_tiles for partial [B, H, splits, rows, D]; strides are q_b, q_n, q_h, r_t, r_h; cap 0: none."""
    rows, heads, splits, padded, _ = partial.shape
    blocks = padded // config.block
    m_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    decode_tiles[(splits, heads * blocks, rows)](
        q, balance, hadamard, records, tail, table, starts, lengths, extent, extent if mask is None else mask, partial,
        sums, *strides, table.stride(0), *m_strides, tiles, kv_len, n, blocks, window, scale, cap * LOG2E.value,
        GROUP=group, PAGED=paged, PAGE=page, SPARE=spare, MP=config.block, MASKED=mask is not None,
        ADDITIVE=mask is not None and mask.is_floating_point(), ROWS=rows_differ, SOFTCAP=cap > 0, ASM=asm,
        OPEN=max(16, config.step // 4), STEP=config.step, WARPS=config.num_warps, **offsets,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg)
