"""Attention of one decode step over packed tiles: split-K, scales in the small operand, tokens on the M side."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import torch
import triton
import triton.language as tl

from kvarn.kernels.bits import CODE_UNIT, codes, e4m3_pair, exchanged, from_e4m3, half_pair
from kvarn.kernels.tail import word_key, word_value

LOG2E = tl.constexpr(1.4426950408889634)
BATCH = tl.constexpr(16)
"""Tiles whose zero points, mean directions and exact rows are multiplied at once: one matrix instruction's depth."""


@triton.jit(do_not_specialize=["m_b", "m_h", "m_n", "m_s", "T", "splits", "group", "n"])
def decode_tiles(
    q,  # [B, H, MP, D] float16, store frame, times scale * log2(e)
    records,  # [B, H, T, RECORD] uint8, store frame
    tail,  # [B, H, TAIL] uint8, store frame
    lengths,  # [B] int64
    extent,  # [B, H, 4] int32 (prepare.py)
    mask,  # [B, Hq, n, S] uint8 or float, any strides; unused without MASKED
    partial,  # [B, H, splits + 1, MP, D] float32, store frame, out: sum of 2^(score - peak) * value
    sums_out,  # [B, H, splits + 1, 2, MP] float32, out: peak and sum of 2^(score - peak)
    m_b, m_h, m_n, m_s, T, splits, group, n,
    MP: tl.constexpr, MASKED: tl.constexpr, ADDITIVE: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
    STEP: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, E: tl.constexpr,
    VW: tl.constexpr,
    RECORD: tl.constexpr, TAIL: tl.constexpr, K_CODES: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr,
    CHANNEL: tl.constexpr, TOKEN: tl.constexpr, W: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr,
    EXACT_AT: tl.constexpr, WORDS: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):
    """Grid (splits + 1, H, B). Program 0 attends the open tile in the tail, program s > 0 the s-th part of the records.

        scores = (codes (q * ks) + q . kz) * kt      out = codes (p * vt) - c * sum(p * vt) + m (p . w) + exact (p[at])

    (kvarn/closed.py). The last two terms and q . kz are gathered over BATCH tiles into one product each.
    """
    split, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 4 * Q
    PK: tl.constexpr = 8 // KB
    PV: tl.constexpr = 8 // VB
    DK: tl.constexpr = D // PK
    DV: tl.constexpr = D // PV
    head = b * tl.num_programs(1) + h
    first, last = tl.load(extent + head * 4), tl.load(extent + head * 4 + 1)
    sparse = tl.load(extent + head * 4 + 2) == 0
    begin, end = first // G, (last + G - 1) // G
    opened = (tl.maximum(tl.load(lengths + b) - 1, 0) // G).to(tl.int32)
    held = (opened >= begin) & (opened < end)
    tok, dk, dv, mp = tl.arange(0, G), tl.arange(0, DK), tl.arange(0, DV), tl.arange(0, MP)
    row_mask = (mp % group) * m_h + tl.minimum(mp // group, n - 1) * m_n
    qs = ()
    for i in tl.static_range(PK):
        x = tl.load(q + head * MP * D + i * DK + mp[None, :] * D + dk[:, None])
        qs = qs + (x * 2.0 ** (8 - KB - i * KB),)
    peak, total = tl.full([MP], float("-inf"), tl.float32), tl.zeros([MP], tl.float32)
    acc = ()
    for _ in tl.static_range(PV):
        acc = acc + (tl.zeros([DV, MP], tl.float32),)

    if split == 0:
        own = tail + head * TAIL
        if held:
            words = (own + WORDS).to(tl.pointer_type(tl.int16))
            s = tl.zeros([G, MP], tl.float32)
            for i in tl.static_range(PK):
                key = word_key(tl.load(words + tok[:, None] * D + i * DK + dk[None, :]), VW).to(tl.float16)
                s = tl.dot(key * 2.0 ** (KB + i * KB - 8), qs[i], s)
            kt = tl.load((own + K_SCALE).to(tl.pointer_type(tl.float16)) + tok).to(tl.float32)
            s = s * kt[:, None]
            s += bias(mask, m_b, m_h * group, row_mask, opened * G, tok, first, last, sparse, m_s, MASKED, ADDITIVE,
                      ROWS)
            peak = tl.max(s, axis=0)
            p = tl.exp2(s - tl.where(peak == float("-inf"), 0.0, peak)[None, :])
            total = tl.sum(p, axis=0)
            vt = tl.load((own + V_SCALE).to(tl.pointer_type(tl.float16)) + tok).to(tl.float32)
            pv = (p * vt[:, None]).to(tl.float16)
            new = ()
            for i in tl.static_range(PV):
                value = word_value(tl.load(words + tok[None, :] * D + i * DV + dv[:, None]), VW).to(tl.float16)
                new = new + (tl.dot(value, pv),)
            acc = new
    else:
        base = records + head * T * RECORD
        step = tl.arange(0, STEP)
        step_at = step if ASM else exchanged(step)
        dk_at = dk if ASM else exchanged(dk)
        count = end - begin - held.to(tl.int32)
        per = tl.cdiv(count, splits)
        low = (split - 1) * per
        high = tl.minimum(low + per, count)
        skip = tl.where(held, opened, end)
        row = tl.arange(0, BATCH)
        ones = tl.full([16, STEP], 1, tl.uint8)
        sums = tl.zeros([16, MP], tl.float32)
        for start in range(low, high, BATCH):
            tiles = begin + start + row
            tiles += (tiles >= skip).to(tl.int32)
            stop = tl.minimum(start + BATCH, high)
            some = row < stop - start
            recs = base + tiles.to(tl.int64) * RECORD
            zero = tl.zeros([BATCH, MP], tl.float32)
            for i in tl.static_range(PK):
                channels = tl.load((recs[:, None] + CHANNEL).to(tl.pointer_type(tl.int32)) + i * DK + dk[None, :],
                                   mask=some[:, None], other=0)
                zero = tl.dot(half_pair(channels)[1] * 2.0 ** (KB + i * KB - 8), qs[i], zero)
            zero *= 2.0 ** -(16 + KB)
            pw = tl.zeros([BATCH, MP], tl.float32)
            after = base + tile_at(begin + start, skip) * RECORD
            next_unit = tl.load((after + SCALARS).to(tl.pointer_type(tl.float32)))
            for t in range(start, stop):
                tile = tile_at(begin + t, skip)
                rec = base + tile * RECORD
                unit = next_unit
                after = base + tile_at(begin + tl.minimum(t + 1, stop - 1), skip) * RECORD
                next_unit = tl.load((after + SCALARS).to(tl.pointer_type(tl.float32)))
                here = (row == t - start)[:, None]
                zeros = tl.sum(tl.where(here, zero, 0.0), axis=0)[None, :]
                folded = ()
                for i in tl.static_range(PK):
                    ks = half_pair(tl.load((rec + CHANNEL).to(tl.pointer_type(tl.int32)) + i * DK + dk))[0]
                    folded = folded + (qs[i] * ks[:, None],)
                for c in tl.static_range(G // STEP):
                    kb = tl.load(rec + K_CODES + (c * STEP + step)[:, None] * DK + dk_at[None, :])
                    s = tl.zeros([STEP, MP], tl.float32) + zeros
                    for i in tl.static_range(PK):
                        s = tl.dot(codes(kb, (2**KB - 1) << (i * KB), ASM), folded[i], s)
                    word = tl.load((rec + TOKEN).to(tl.pointer_type(tl.int32)) + c * STEP + step)
                    kt = half_pair(word)[0].to(tl.float32) * 2.0 ** (16 + KB)
                    shift = tl.zeros([STEP, MP if ROWS else 1], tl.float32)
                    pos = tile.to(tl.int32) * G + c * STEP
                    if sparse | (pos < first) | (pos + STEP > last):
                        shift = bias(mask, m_b, m_h * group, row_mask, pos, step, first, last, sparse, m_s, MASKED,
                                     ADDITIVE, ROWS)
                    if E > 0:  # an exact token's kt is -0.0: its turn comes below
                        shift = tl.where((word & 0xFFFF == 0x8000)[:, None], float("-inf"), shift)
                    s = s * kt[:, None] + shift
                    new_peak = tl.maximum(peak, tl.max(s, axis=0))
                    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                    p = tl.exp2(s - safe[None, :])
                    alpha = tl.exp2(peak - safe)
                    peak = new_peak
                    if VB > 2:
                        vt = half_pair(word)[1].to(tl.float32) * unit
                        w = from_e4m3(tl.load(rec + W + c * STEP + step).to(tl.int32)) * 2.0**-8
                    else:
                        vt, w = e4m3_pair(word)
                        vt *= unit * 256.0
                    pv = (p * vt[:, None]).to(tl.float16)
                    vb = tl.load(rec + V_CODES + dv[:, None] * G + c * STEP + step_at[None, :])
                    new = ()
                    for i in tl.static_range(PV):
                        new = new + (tl.dot(codes(vb, (2**VB - 1) << (i * VB), ASM), pv, acc[i] * alpha[None, :]),)
                    acc = new
                    sums = tl.dot(codes(ones, 1, ASM), pv, sums * alpha[None, :])
                    p_sum, w_sum = sum_two(p, p * w[:, None], ASM)
                    total = total * alpha + p_sum
                    pw = pw * alpha[None, :] + tl.where(here, w_sum[None, :], 0.0)
            w_unit = tl.load((recs + SCALARS).to(tl.pointer_type(tl.float32)) + 1, mask=some, other=0.0)
            ranks = ()
            for i in tl.static_range(PV):
                column = recs[None, :] + M + (i * DV + dv)[:, None]
                m = from_e4m3(tl.load(column, mask=some[None, :], other=0).to(tl.int32)) * (256.0 * w_unit)[None, :]
                ranks = ranks + (tl.dot(m.to(tl.float16), pw.to(tl.float16)),)
            for e in tl.static_range(E):
                at = tl.load(recs + EXACT_AT + e, mask=some, other=0).to(tl.int32)
                scalars = (recs + SCALARS).to(tl.pointer_type(tl.float32)) + 2 + 2 * e
                words = (recs + EXACT).to(tl.pointer_type(tl.int16)) + e * D
                exact = tl.zeros([BATCH, MP], tl.float32)
                for i in tl.static_range(PK):
                    key = tl.load(words[:, None] + i * DK + dk[None, :], mask=some[:, None], other=0)
                    key = word_key(key, VW).to(tl.float16) * 2.0 ** (KB + i * KB - 8)
                    exact = tl.dot(key, qs[i], exact)
                exact = exact * tl.load(scalars, mask=some, other=0.0)[:, None]
                place = (tiles * G + at).to(tl.int64)
                exact += bias(mask, m_b, m_h * group, row_mask, 0, place, first, last, sparse, m_s, MASKED, ADDITIVE,
                              ROWS)
                exact = tl.where(some[:, None], exact, float("-inf"))
                new_peak = tl.maximum(peak, tl.max(exact, axis=0))
                safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                alpha = tl.exp2(peak - safe)
                exact = tl.exp2(exact - safe[None, :])
                total = total * alpha + tl.sum(exact, axis=0)
                peak = new_peak
                sums *= alpha[None, :]
                px = (exact * tl.load(scalars + 1, mask=some, other=0.0)[:, None]).to(tl.float16)
                new, new_ranks = (), ()
                for i in tl.static_range(PV):
                    value = tl.load(words[None, :] + (i * DV + dv)[:, None], mask=some[None, :], other=0)
                    value = word_value(value, VW).to(tl.float16)
                    new_ranks = new_ranks + (tl.dot(value, px, ranks[i] * alpha[None, :]),)
                    new = new + (acc[i] * alpha[None, :],)
                acc, ranks = new, new_ranks
            new = ()
            for i in tl.static_range(PV):
                new = new + (acc[i] + ranks[i] * (CODE_UNIT * 2.0 ** (i * VB)),)
            acc = new
        center = tl.max(sums, axis=0) * (2.0**24 * (2**VB - 1) / 2)
        new = ()
        for i in tl.static_range(PV):
            new = new + (acc[i] * (2.0 ** (24 - i * VB)) - center[None, :],)
        acc = new

    out = head * (splits + 1) + split
    for i in tl.static_range(PV):
        tl.store(partial + (out * MP + mp)[None, :] * D + i * DV + dv[:, None], acc[i])
    tl.store(sums_out + out * 2 * MP + mp, peak)
    tl.store(sums_out + (out * 2 + 1) * MP + mp, total)


@triton.jit
def tile_at(index, skip):
    """The index-th tile of a range that leaves out tile `skip`, int64."""
    return (index + (index >= skip).to(tl.int32)).to(tl.int64)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_two(x, y, TOGETHER: tl.constexpr):
    """Sums over axis 0 of x and y; together they cost one exchange between warps."""
    if TOGETHER:
        return tl.reduce((x, y), 0, _add_two)
    else:
        return tl.sum(x, axis=0), tl.sum(y, axis=0)


@triton.jit
def bias(mask, m_b, m_h, row_mask, start, offset, first, last, sparse, m_s, MASKED: tl.constexpr,
         ADDITIVE: tl.constexpr, ROWS: tl.constexpr):
    """What the mask adds to scores of positions start + offset [G], in log2 units: [G, 1], or [G, MP] with ROWS."""
    inside = (start + offset >= first) & (start + offset < last)
    if MASKED:
        at, read = offset[:, None] * m_s, (inside & sparse)[:, None]
        # Made here from what costs no register to keep: most steps never come by.
        source = mask + tl.program_id(2).to(tl.int64) * m_b + tl.program_id(1) * m_h + tl.cast(start, tl.int64) * m_s
        if ROWS:
            at, read = at + row_mask[None, :], read & (row_mask >= 0)[None, :]
        if ADDITIVE:
            value = tl.load(source + at, mask=read, other=0.0).to(tl.float32)
            value = tl.where(value == float("-inf"), value, tl.maximum(value * LOG2E, -1e38))
        else:
            value = tl.where(tl.load(source + at, mask=read, other=1) != 0, 0.0, float("-inf"))
        return tl.where(inside[:, None], value, float("-inf"))
    else:
        return tl.where(inside, 0.0, float("-inf"))[:, None]


def decode(q: torch.Tensor, records: torch.Tensor, tail: torch.Tensor, lengths: torch.Tensor, extent: torch.Tensor,
           mask: torch.Tensor | None, rows_differ: bool, partial: torch.Tensor, sums: torch.Tensor, group: int, n: int,
           asm: bool, step: int, num_warps: int, num_stages: int, maxnreg: int | None, **offsets: int) -> None:
    """Launch decode_tiles: q [B, H, MP, D] rotated; partial [B, H, splits + 1, MP, D]; mask as in prepare."""
    rows, heads, padded, _ = q.shape
    programs = partial.shape[2]
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    decode_tiles[(programs, heads, rows)](
        q, records, tail, lengths, extent, extent if mask is None else mask, partial, sums, *strides, records.shape[2],
        programs - 1, group, n, MP=padded, MASKED=mask is not None,
        ADDITIVE=mask is not None and mask.is_floating_point(), ROWS=rows_differ, ASM=asm, STEP=step, **offsets,
        num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)
