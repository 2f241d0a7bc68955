"""Pieces of decode_tiles (decode.py), inside kernels: softmax bookkeeping, tokens held as words.

Scores are in log2 units. Accumulators are PV planes [DV, MP] float32.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import CODE_UNIT, halves
from kvarn.kernels.flight import registers, together, types
from kvarn.kernels.quarters import joined
from kvarn.kernels.sight import soften


@triton.jit
def advance(peak, s, WARPS: tl.constexpr):
    """A softmax's peak [MP] moved on by scores s [R, MP]: the new one, it without infinity, the factor for old sums.

    Each of two warps finds its own highest score first. Of these a thread then takes both: to split a dimension needs
    it in one thread, so that they are exchanged once; a maximum over warps would be exchanged and brought back.
    """
    if WARPS == 2 and s.shape[0] > 16:
        high = tl.max(tl.reshape(s, (s.shape[0] // 32, 2, 16, s.shape[1])), axis=0)
        low, high = tl.split(tl.trans(tl.max(high, axis=1)))
        high = tl.maximum(low, high)
    else:
        high = tl.max(s, axis=0)
    new = tl.maximum(peak, high)
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, safe, tl.exp2(peak - safe)


@triton.jit
def tile_at(index, skip):
    """The index-th tile of a range that leaves out tile `skip`."""
    return index + (index >= skip).to(tl.int32)


@triton.jit
def of_lanes(p, WARPS: tl.constexpr):
    """p [R, MP], a matrix product's result, summed over the tokens that one thread holds: [16 WARPS, MP]."""
    return tl.sum(tl.reshape(p, (p.shape[0] // (16 * WARPS), 16 * WARPS, p.shape[1])), axis=0)


@triton.jit
def of_warps(x, WARPS: tl.constexpr):
    """What of_lanes returns, summed over the threads of each warp: 16 rows of the same, WARPS times."""
    x = tl.reshape(x, (WARPS, 16, x.shape[1]))
    return tl.reshape(tl.broadcast_to(tl.sum(x, axis=1, keep_dims=True), x.shape), (16 * WARPS, x.shape[2]))


@triton.constexpr_function
def _products(count: int) -> str:
    return "".join(f"mul.rn.f16x2 ${i}, ${count + i}, ${2 * count + i}; " for i in range(count))


@triton.jit
def fold(qs, ks, ASM: tl.constexpr):
    """The query's planes of halves times ks, a tuple of planes [DK]: lower and upper half of each plane in turn.

    The inline assembly makes all of them at once, for the reason flight.together has; with that instead, the loop over
    tiles is a few instructions longer.
    """
    x, y = (), ()
    for i in tl.static_range(len(ks)):
        low, high = halves(ks[i])
        x = x + (qs[0][i], qs[1][i])
        y = y + (tl.broadcast_to(low[:, None], qs[0][i].shape), tl.broadcast_to(high[:, None], qs[1][i].shape))
    count: tl.constexpr = len(x)
    if ASM:
        return tl.inline_asm_elementwise(_products(count), registers(count, 2 * count, tl.float16), x + y,
                                         dtype=types(count, tl.float16), is_pure=True, pack=2)
    else:
        out = ()
        for i in tl.static_range(count):
            out = out + (x[i] * y[i],)
        return out


@triton.constexpr_function
def _take_field(shift: int, bits: int) -> str:
    mask, center = (2**bits - 1) * 0x10001, (0x6400 + 2 ** (bits - 1)) * 0x10001
    return (f"{{ .reg .b32 h, c; shr.u32 h, $1, {shift}; mov.b32 c, {center}; lop3.b32 h, h, {mask}, c, 0x6a; "
            f"sub.rn.f16x2 $0, h, c; }}")


@triton.jit
def word_field(word, SHIFT: tl.constexpr, FIELD: tl.constexpr, ASM: tl.constexpr):
    """The two's complement `FIELD` bits of int16 words from bit SHIFT on, as float16.

    With its highest bit turned and 0x6400 around it, a field of up to 10 bits is a float16: 1024 + 2^(bits - 1) more
    than it says. The inline assembly takes that from two words at once.
    """
    if ASM:
        return tl.inline_asm_elementwise(_take_field(SHIFT, FIELD), "=r,r", [word], dtype=tl.float16, is_pure=True,
                                         pack=2)
    else:
        return ((word.to(tl.int32) << (32 - SHIFT - FIELD)) >> (32 - FIELD)).to(tl.float16)


@triton.jit
def load_words(words, seen, PK: tl.constexpr, DK: tl.constexpr, PV: tl.constexpr, DV: tl.constexpr):
    """Tokens at int16 pointers words [R]: PK planes [R, DK] to take keys from, PV planes [DV, R] for values."""
    dk, dv = tl.arange(0, DK), tl.arange(0, DV)
    keys, values = (), ()
    for i in tl.static_range(PK):
        keys = keys + (tl.load(words[:, None] + i * DK + dk[None, :], mask=seen[:, None], other=0),)
    for i in tl.static_range(PV):
        values = values + (tl.load(words[None, :] + (i * DV + dv)[:, None], mask=seen[None, :], other=0),)
    return keys, values


@triton.jit
def load_exact(recs, some, e: tl.constexpr, PK: tl.constexpr, DK: tl.constexpr, PV: tl.constexpr, DV: tl.constexpr,
               SCALARS: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr):
    """The e-th exact token of each record at recs [R]: where it is in its tile, its key's and its value's scale, [R]
    each, and its words as load_words has them.
    """
    scales = (recs + SCALARS).to(tl.pointer_type(tl.float32)) + 2 + 2 * e
    words = (recs + EXACT).to(tl.pointer_type(tl.int16)) + e * (PK * DK)
    keys, values = load_words(words, some, PK, DK, PV, DV)
    return (tl.load(recs + EXACT_AT + e, mask=some, other=0).to(tl.int32), tl.load(scales, mask=some, other=0.0),
            tl.load(scales + 1, mask=some, other=0.0), keys, values)


@triton.jit
def word_scores(words, qs, KB: tl.constexpr, VW: tl.constexpr, ASM: tl.constexpr):
    """Keys in planes of words [R, DK], without their scale, times the query planes: [R, MP]."""
    s = tl.zeros([words[0].shape[0], qs[0][0].shape[1]], tl.float32)
    fields = ()
    for i in tl.static_range(len(words)):
        low, high = halves(words[i])
        fields = fields + (word_field(low, VW, 16 - VW, ASM), word_field(high, VW, 16 - VW, ASM))
    fields = together(fields, ASM)
    for i in tl.static_range(len(words) - 1, -1, -1):  # each plane of qs is 2^KB less than the one before
        s = tl.dot(fields[2 * i], qs[0][i], s * 2.0**KB)
        s = tl.dot(fields[2 * i + 1], qs[1][i], s)
    return s * 2.0 ** (KB - 8)


@triton.jit
def attend_words(keys, values, seen, k_scale, v_scale, shift, qs, cap, peak, total, sum_pv, acc, SOFTCAP: tl.constexpr,
                 ASM: tl.constexpr, WARPS: tl.constexpr, KB: tl.constexpr, VW: tl.constexpr):
    """Attention over tokens held as words (load_words) onto what there is; acc in plain units.

    What lies where none is `seen` [R] is never looked at; shift is added to the scores.
    """
    s = soften(word_scores(keys, qs, KB, VW, ASM) * k_scale[:, None], cap, SOFTCAP) + shift
    s = tl.where(seen[:, None], s, float("-inf"))
    peak, safe, alpha = advance(peak, s, WARPS)
    p = tl.exp2(s - safe[None, :])
    total = total * alpha[None, :] + (tl.sum(p, axis=0) * (1.0 / total.shape[0]))[None, :]
    p, new, fields = (p * v_scale[:, None]).to(tl.float16), (), ()
    for i in tl.static_range(len(values)):
        fields = fields + (word_field(values[i], 0, VW, ASM),)
    fields = together(fields, ASM)
    for i in tl.static_range(len(values)):
        new = new + (tl.dot(fields[i], p, acc[i] * alpha[None, :]),)
    return peak, total, sum_pv * alpha[None, :], new


@triton.jit
def stacked(planes):
    """Planes [DV, MP], one, two or four, as one [D, MP]: what was in a thread stays there."""
    if len(planes) == 1:
        return planes[0]
    else:
        if len(planes) == 2:
            x = tl.permute(tl.join(planes[0], planes[1]), (2, 0, 1))
        else:
            x = tl.permute(joined(planes), (2, 3, 0, 1))
        return tl.reshape(x, (len(planes) * planes[0].shape[0], planes[0].shape[1]))


@triton.jit
def in_codes(planes, VB: tl.constexpr):
    """Planes in plain units to those in which tiles' codes add up: 2^(i VB) CODE_UNIT for plane i. Exact."""
    new = ()
    for i in tl.static_range(len(planes)):
        new = new + (planes[i] * (CODE_UNIT * 2.0 ** (i * VB)),)
    return new


@triton.jit
def from_codes(planes, VB: tl.constexpr):
    """The inverse of in_codes."""
    new = ()
    for i in tl.static_range(len(planes)):
        new = new + (planes[i] * (2.0 ** (24 - i * VB)),)
    return new
