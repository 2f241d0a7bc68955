"""A tile to its record inside kernels. The formulas are kvarn/closed.py's; record.py is the way back.

A tile comes as four quarters [Q, G] of channels by tokens, both in `exchanged` order: packed bytes are then contiguous.
All channels of a token lie in one warp. Numbers [G] of tokens are by_warp and numbers [D] of channels as flat_channels
(sums.py), until they meet the tile again: by_column, or parted into its quarters.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import at_nearest, exchanged, from_e4m3, half_bits, half_pair, half_upward, number_at, to_e4m3
from kvarn.kernels.quarters import parted
from kvarn.kernels.record import store_plane
from kvarn.kernels.sums import (
    a_thread_each,
    by_column,
    by_warp,
    channel_sum,
    extremes,
    flat_channels,
    folded,
    folded4,
    token_sum,
    tokens,
)
from kvarn.kernels.tail import scale_of, word_code

_STEP2 = tl.constexpr(0.9957)
_STEP4 = tl.constexpr(0.3352)


@triton.jit
def find_exact(norm, G: tl.constexpr, Q: tl.constexpr, E: tl.constexpr):
    """Choose a tile's exact tokens by their values' squared lengths `norm` [G].

    Of equals the first: a length, never negative, orders as its bits do, and the token stands below them. The next
    round sees the one found as the greatest. Returns which they are, [G], and the tokens, a tuple.
    """
    tok = tokens(G, Q)
    left = (norm.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tok
    exact, found = tok < 0, ()
    for _ in tl.static_range(E):
        token = tl.min(left, axis=0).to(tl.int32)
        hit = tok == token
        exact, found, left = exact | hit, found + (token,), tl.where(hit, 0x7FFFFFFFFFFFFFFF, left)
    return exact, found


@triton.jit
def exact_columns(x, found, readable, G: tl.constexpr, Q: tl.constexpr, E: tl.constexpr):
    """The columns of a tile x of the tokens that find_exact found: a tuple of [D], channels as flat_channels."""
    out = ()
    for e in tl.static_range(E):
        hit = (exchanged(tl.arange(0, G)) == found[e]).to(tl.float32)[None, :]
        out = out + (channel_sum((x[0] * hit, x[1] * hit, x[2] * hit, x[3] * hit), readable),)
    return out


@triton.jit
def write_exact(rec, found, k, v, Q: tl.constexpr, E: tl.constexpr, VW: tl.constexpr, SCALARS: tl.constexpr,
                EXACT: tl.constexpr, EXACT_AT: tl.constexpr):
    """The exact tokens, their words and scales: `found` of find_exact, k and v of exact_columns."""
    scales = (rec + SCALARS).to(tl.pointer_type(tl.float32)) + 2
    words = (rec + EXACT).to(tl.pointer_type(tl.int16)) + flat_channels(Q)
    for e in tl.static_range(E):
        k_top, v_top = tl.split(tl.max(tl.abs(tl.join(k[e], v[e])), axis=0))
        k_scale, v_scale = scale_of(k_top, 16 - VW), scale_of(v_top, VW)
        tl.store(scales + 2 * e, k_scale)
        tl.store(scales + 2 * e + 1, v_scale)
        word = (word_code(k[e], k_scale, 16 - VW) << VW) | (word_code(v[e], v_scale, VW) & (2**VW - 1))
        tl.store(words + e * 4 * Q, word.to(tl.int16))
        tl.store(rec + EXACT_AT + e, found[e].to(tl.uint8))


@triton.jit
def encode_values(rec, v, norm, exact, readable, G: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr,
                  V_CODES: tl.constexpr, SCALARS: tl.constexpr, W: tl.constexpr, M: tl.constexpr):
    """Write a tile's v_codes, units and m: v finite, of squared lengths `norm` [G], tokens `exact` [G] of no scale.

    Returns the upper half of the token words [G] int32.
    """
    half: tl.constexpr = (2**BITS - 1) / 2
    m_bits = to_e4m3(mean_direction(v, norm, readable, Q))
    tl.store(rec + M + flat_channels(Q), m_bits.to(tl.uint8))
    m = from_e4m3(m_bits)
    m = parted(tl.reshape(m, (Q, 2, 2)))
    m_length = tl.maximum(tl.sum(m[0] * m[0] + m[1] * m[1] + m[2] * m[2] + m[3] * m[3], axis=0), 1e-30)
    along = v[0] * m[0][:, None], v[1] * m[1][:, None], v[2] * m[2][:, None], v[3] * m[3][:, None]
    along = token_sum(folded4(along), readable, Q)
    w, w_unit = over_unit(tl.where(exact, 0.0, along / m_length))
    w_bits = to_e4m3(w)
    w = from_e4m3(w_bits) * w_unit
    rate = by_column(value_rate(v, w, m, norm, along, m_length, Q, BITS), Q)[None, :]
    w = by_column(w, Q)[None, :]
    product, length = tl.zeros((8, G), tl.float32), tl.zeros((8, G), tl.float32)
    out = rec + V_CODES + exchanged(tl.arange(0, Q))[:, None] * G + tl.arange(0, G)[None, :]
    packed = ()
    for i in tl.static_range(4):
        z = v[i] - w * m[i][:, None]
        length += folded(z * z)
        # floor(x) + half + 1/2 is x + half rounded, ties aside. A clamp to 0..1 is part of a multiply-add.
        code = at_nearest(tl.minimum(tl.maximum(z * rate + 0.5, 0.0), 1.0) * (2.0 * half))
        product += folded(z * (number_at(code) - half))
        packed = store_plane(out, packed, code.to(tl.int32, bitcast=True), i, Q * G, BITS)
    length, product = token_sum(length, readable, Q), token_sum(product, readable, Q)
    vt, vt_unit = over_unit(tl.where(exact, 0.0, length / tl.maximum(product, 1e-30)))
    tl.store((rec + SCALARS).to(tl.pointer_type(tl.float32)), vt_unit)
    tl.store((rec + SCALARS).to(tl.pointer_type(tl.float32)) + 1, w_unit)
    if BITS > 2:
        tl.store(rec + W + tokens(G, Q), w_bits.to(tl.uint8))
        return half_bits(vt) << 16
    else:
        return (to_e4m3(vt) << 16) | (w_bits << 24)


@triton.jit
def encode_keys(rec, k, norm, words, exact, readable, G: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr,
                K_CODES: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr):
    """Write a tile's k_codes, channel and token words, of which encode_values gave the upper halves `words` [G]: k
    finite, of squared lengths `norm` [G], tokens `exact` [G] outside the ranges and of codes 0: a clamp takes their NaN
    for that.
    """
    top: tl.constexpr = 2**BITS - 1
    tok = exchanged(tl.arange(0, G))
    mean = norm / (4 * Q)
    kt_bits = half_bits(tl.minimum(mean * tl.rsqrt(tl.maximum(mean, 1e-37)), 65504.0))
    kt = half_pair(kt_bits)[0].to(tl.float32)
    inverse = a_thread_each(tl.where(exact, float("nan"), 1.0 / tl.where(kt > 0, kt, 1.0)), readable)
    inverse = by_column(inverse, Q)[None, :]
    token = (rec + TOKEN).to(tl.pointer_type(tl.int32)) + tokens(G, Q)
    tl.store(token, tl.where(exact, 0x8000, kt_bits) | words)
    k = k[0] * inverse, k[1] * inverse, k[2] * inverse, k[3] * inverse
    low, high = extremes(k, readable)
    kz = low.to(tl.float16)
    low = kz.to(tl.float32)
    ks = half_upward(tl.maximum(high - low, 0.0) / top)
    word = (ks.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (kz.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    tl.store((rec + CHANNEL).to(tl.pointer_type(tl.int32)) + flat_channels(Q), word)
    step = tl.rsqrt(tl.maximum(ks.to(tl.float32), 1e-30) * top)
    step *= step  # half the instructions of a division
    # Without this, Triton would bring ks to every thread and make both there anew.
    start, step = a_thread_each(low * step, readable), a_thread_each(step, readable)
    start, step = parted(tl.reshape(start, (Q, 2, 2))), parted(tl.reshape(step, (Q, 2, 2)))
    out, packed = rec + K_CODES + tok[None, :] * (Q * BITS // 2) + tl.arange(0, Q)[:, None], ()
    for i in tl.static_range(4):
        code = tl.minimum(tl.maximum(k[i] * step[i][:, None] - start[i][:, None], 0.0), 1.0)
        packed = store_plane(out, packed, at_nearest(code * top).to(tl.int32, bitcast=True), i, Q, BITS)


@triton.jit
def mean_direction(v, norm, readable, Q: tl.constexpr):
    """Mean over tokens of the unit vectors of v, scaled so that its largest magnitude is e4m3's: [D], channels as
    flat_channels.
    """
    weight = by_column(tl.rsqrt(tl.maximum(norm, 1e-37)), Q)[None, :]
    m = channel_sum((v[0] * weight, v[1] * weight, v[2] * weight, v[3] * weight), readable)
    return over_unit(m)[0]


@triton.jit
def over_unit(x):
    """x [n] over its unit, such that the largest magnitude becomes e4m3's largest value; and the unit."""
    unit = tl.max(tl.abs(x), axis=0) / 448.0
    return x * (1.0 / tl.where(unit > 0, unit, 1.0)), unit


@triton.jit
def value_rate(v, w, m, norm, along, m_length, Q: tl.constexpr, BITS: tl.constexpr):
    """One over the rounding step of each token [G]; `along` is <V, m>, `m_length` <m, m>, `norm` <V, V>."""
    if BITS == 8:
        of_column = by_column(w, Q)[None, :]
        top = tl.abs(v[0] - of_column * m[0][:, None])
        for i in tl.static_range(1, 4):
            top = tl.maximum(top, tl.abs(v[i] - of_column * m[i][:, None]))
        return 0.5 / tl.maximum(by_warp(tl.max(top, axis=0), Q), 1e-30)
    else:
        # <Z, Z> without making Z. Where V is nearly w m that is inexact, and there the step need not be exact.
        length = tl.maximum(norm - w * (2.0 * along - w * m_length), norm * 1e-6)
        rate: tl.constexpr = (4 * Q) ** 0.5 / ((2**BITS - 1) * (_STEP2 if BITS == 2 else _STEP4))
        return tl.rsqrt(tl.maximum(length, 1e-37)) * rate
