"""A tile to its record and back inside kernels. The formulas are kvarn/closed.py's.

`rec` is one record, uint8; offsets (upper case) are kvarn/layout.py's, by way of configs.offsets. Keys enter with each
quarter's channels in `exchanged` order, values with the tile's tokens in that order: packed bytes are then contiguous.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import (
    at_nearest,
    exchanged,
    from_e4m3,
    half_bits,
    half_pair,
    half_upward,
    number_at,
    to_e4m3,
)
from kvarn.kernels.quarters import square_sum
from kvarn.kernels.tail import word_code, word_key, word_scale, word_value

_STEP2 = tl.constexpr(0.9957)
_STEP4 = tl.constexpr(0.3352)


@triton.jit
def find_exact(rec, norm, tok, G: tl.constexpr, E: tl.constexpr, EXACT_AT: tl.constexpr):
    """Choose a tile's exact tokens by their values' squared lengths `norm` [G]; write exact_at; which rows they are.

    Row r is token tok[r]. Of equals the first; the next round sees the one found as infinite.
    """
    exact, left = tok < 0, norm
    for e in tl.static_range(E):
        token = tl.min(tl.where(left == tl.min(left, axis=0), tok, G), axis=0)
        exact = exact | (tok == token)
        left = tl.where(tok == token, float("inf"), left)
        tl.store(rec + EXACT_AT + e, token.to(tl.uint8))
    return exact


@triton.jit
def write_exact_value(rec, e, v, Q: tl.constexpr, VW: tl.constexpr, SCALARS: tl.constexpr, EXACT: tl.constexpr):
    """The value of the e-th exact token, four quarters [Q]; its key comes after a barrier."""
    scale = word_scale(v, VW)
    tl.store((rec + SCALARS).to(tl.pointer_type(tl.float32)) + 3 + 2 * e, scale)
    for i in tl.static_range(4):
        word = (rec + EXACT).to(tl.pointer_type(tl.int16)) + (e * 4 + i) * Q + tl.arange(0, Q)
        tl.store(word, (word_code(v[i], scale, VW) & (2**VW - 1)).to(tl.int16))


@triton.jit
def write_exact_key(rec, e, k, channel, Q: tl.constexpr, VW: tl.constexpr, SCALARS: tl.constexpr, EXACT: tl.constexpr):
    """Its key, four quarters [Q] with channels in the order `channel`."""
    scale = word_scale(k, 16 - VW)
    tl.store((rec + SCALARS).to(tl.pointer_type(tl.float32)) + 2 + 2 * e, scale)
    for i in tl.static_range(4):
        word = (rec + EXACT).to(tl.pointer_type(tl.int16)) + (e * 4 + i) * Q + channel
        tl.store(word, ((word_code(k[i], scale, 16 - VW) << VW) | tl.load(word).to(tl.int32)).to(tl.int16))


@triton.jit
def encode_values(rec, v, norm, exact, tok, G: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, V_CODES: tl.constexpr,
                  SCALARS: tl.constexpr, W: tl.constexpr, M: tl.constexpr):
    """Write a tile's v_codes, units and m: v four quarters [G, Q], finite, of squared lengths `norm` [G]; row r is
    token tok[r], and an exact one where `exact`.

    Returns the upper half of the token words [G] int32.
    """
    half: tl.constexpr = (2**BITS - 1) / 2
    at = tl.arange(0, Q)
    m = mean_direction(v, norm, G)
    for i in tl.static_range(4):
        tl.store(rec + M + i * Q + at, to_e4m3(m[i]).to(tl.uint8))
    m = (from_e4m3(to_e4m3(m[0])), from_e4m3(to_e4m3(m[1])), from_e4m3(to_e4m3(m[2])), from_e4m3(to_e4m3(m[3])))
    length = tl.maximum(tl.sum(m[0] * m[0] + m[1] * m[1] + m[2] * m[2] + m[3] * m[3], axis=0), 1e-30)
    w = tl.sum(v[0] * m[0][None, :] + v[1] * m[1][None, :] + v[2] * m[2][None, :] + v[3] * m[3][None, :], axis=1)
    w, w_unit = over_unit(tl.where(exact, 0.0, tl.div_rn(w, length)))
    w_bits = to_e4m3(w)
    w = from_e4m3(w_bits) * w_unit
    # Z is made twice rather than kept: registers are what lacks here.
    length = square_sum(residual(v, w, m))
    inverse = ((0.5 / half) / tl.maximum(value_step(v, w, m, length, Q, BITS), 1e-30))[:, None]
    product = tl.zeros_like(v[0])
    out, packed = rec + V_CODES + at[None, :] * G + tl.arange(0, G)[:, None], ()
    for i in tl.static_range(4):
        z = v[i] - w[:, None] * m[i][None, :]
        # floor(x) + half + 1/2 is x + half rounded, ties aside. A clamp to 0..1 is part of a multiply-add.
        code = at_nearest(tl.minimum(tl.maximum(z * inverse + 0.5, 0.0), 1.0) * (2.0 * half))
        product += z * (number_at(code) - half)
        packed = store_plane(out, packed, code.to(tl.int32, bitcast=True), i, Q * G, BITS)
    product = tl.sum(product, axis=1)
    vt, vt_unit = over_unit(tl.where(exact, 0.0, tl.div_rn(length, tl.maximum(product, 1e-30))))
    tl.store((rec + SCALARS).to(tl.pointer_type(tl.float32)), vt_unit)
    tl.store((rec + SCALARS).to(tl.pointer_type(tl.float32)) + 1, w_unit)
    if BITS > 2:
        tl.store(rec + W + tok, w_bits.to(tl.uint8))
        return half_bits(vt) << 16
    else:
        return (to_e4m3(vt) << 16) | (w_bits << 24)


@triton.jit
def encode_keys(rec, k, norm, words, exact, tok, Q: tl.constexpr, BITS: tl.constexpr, K_CODES: tl.constexpr,
                CHANNEL: tl.constexpr, TOKEN: tl.constexpr):
    """Write a tile's k_codes, channel and token words, of which encode_values gave the upper halves `words` [G]: k four
    quarters [G, Q], finite, channels exchanged, of squared lengths `norm` [G]; row r is token tok[r].
    """
    top: tl.constexpr = 2**BITS - 1
    kt_bits = half_bits(tl.minimum(tl.sqrt_rn(norm / (4 * Q)), 65504.0))
    kt = half_pair(kt_bits)[0].to(tl.float32)
    inverse = tl.div_rn(1.0, tl.where(kt > 0, kt, 1.0))[:, None]
    at = tl.arange(0, Q)
    channel = exchanged(at)
    out, packed = rec + K_CODES + tok[:, None] * (Q * BITS // 2) + at[None, :], ()
    for i in tl.static_range(4):
        u = k[i] * inverse
        kz = tl.min(tl.where(exact[:, None], float("inf"), u), axis=0).to(tl.float16)
        low = kz.to(tl.float32)
        high = tl.max(tl.where(exact[:, None], float("-inf"), u), axis=0)
        ks = half_upward(tl.maximum(high - low, 0.0) / top)
        word = (ks.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (half_bits(low) << 16)
        tl.store((rec + CHANNEL).to(tl.pointer_type(tl.int32)) + i * Q + channel, word)
        step = tl.rsqrt(tl.maximum(ks.to(tl.float32), 1e-30))
        step *= step * (1.0 / top)  # a division has three times the instructions, and every thread does them all
        code = tl.minimum(tl.maximum(u * step[None, :] - (low * step)[None, :], 0.0), 1.0)
        code = at_nearest(code * top)
        packed = store_plane(out, packed, code.to(tl.int32, bitcast=True), i, Q, BITS)
    kt_bits = tl.where(exact, 0x8000, kt_bits)
    tl.store((rec + TOKEN).to(tl.pointer_type(tl.int32)) + tok, kt_bits | words)


@triton.jit
def mean_direction(v, norm, G: tl.constexpr):
    """Mean over tokens of the unit vectors of v, scaled so that its largest magnitude is e4m3's: four quarters [Q]."""
    weight = tl.div_rn(1.0 / G, tl.maximum(tl.sqrt_rn(norm), 1e-30))[:, None]
    m0, m1 = tl.sum(v[0] * weight, axis=0), tl.sum(v[1] * weight, axis=0)
    m2, m3 = tl.sum(v[2] * weight, axis=0), tl.sum(v[3] * weight, axis=0)
    top = tl.max(tl.maximum(tl.maximum(tl.abs(m0), tl.abs(m1)), tl.maximum(tl.abs(m2), tl.abs(m3))), axis=0)
    unit = top / 448.0
    unit = tl.where(unit > 0, unit, 1.0)
    inverse = 1.0 / unit
    return m0 * inverse, m1 * inverse, m2 * inverse, m3 * inverse


@triton.jit
def over_unit(x):
    """x [n] over its unit, such that the largest magnitude becomes e4m3's largest value; and the unit."""
    unit = tl.max(tl.abs(x), axis=0) / 448.0
    return x * (1.0 / tl.where(unit > 0, unit, 1.0)), unit


@triton.jit
def residual(v, w, m):
    """Z = V - w m: four quarters [G, Q]."""
    w = w[:, None]
    return v[0] - w * m[0][None, :], v[1] - w * m[1][None, :], v[2] - w * m[2][None, :], v[3] - w * m[3][None, :]


@triton.jit
def value_step(v, w, m, length, Q: tl.constexpr, BITS: tl.constexpr):
    """Rounding step per token [G]; `length` is the sum of squares of Z."""
    if BITS == 8:
        z = residual(v, w, m)
        top = tl.maximum(tl.maximum(tl.abs(z[0]), tl.abs(z[1])), tl.maximum(tl.abs(z[2]), tl.abs(z[3])))
        return tl.max(top, axis=1) / 127.5
    rms = tl.sqrt_rn(length / (4 * Q))
    if BITS == 2:
        return rms * _STEP2
    else:
        return rms * _STEP4


@triton.jit
def store_plane(out, packed, code, i: tl.constexpr, QUARTER: tl.constexpr, BITS: tl.constexpr):
    """Add the i-th quarter's codes, the low bytes of int32, to the bytes packed so far; store bytes as soon as they are
    full. `out` points at the first quarter's bytes, QUARTER from the next. Returns what is still to be stored.
    """
    if BITS == 8:
        tl.store(out + i * QUARTER, code.to(tl.uint8))
    elif BITS == 4:
        if i < 2:
            packed = packed + (code,)
        else:
            tl.store(out + (i - 2) * QUARTER, (packed[i - 2] | (code << 4)).to(tl.uint8))
    elif i == 0:
        packed = (code,)
    else:
        packed = (packed[0] | (code << (2 * i)),)
        if i == 3:
            tl.store(out, packed[0].to(tl.uint8))
    return packed


@triton.jit
def load_planes(src, mask, QUARTER: tl.constexpr, BITS: tl.constexpr):
    """The inverse of store_plane: four quarters of codes float32."""
    if BITS == 2:
        b = tl.load(src, mask=mask, other=0)
        q = (b & 3, (b >> 2) & 3, (b >> 4) & 3, b >> 6)
    elif BITS == 4:
        b, c = tl.load(src, mask=mask, other=0), tl.load(src + QUARTER, mask=mask, other=0)
        q = (b & 15, c & 15, b >> 4, c >> 4)
    else:
        q = (tl.load(src, mask=mask, other=0), tl.load(src + QUARTER, mask=mask, other=0),
             tl.load(src + 2 * QUARTER, mask=mask, other=0), tl.load(src + 3 * QUARTER, mask=mask, other=0))
    return q[0].to(tl.float32), q[1].to(tl.float32), q[2].to(tl.float32), q[3].to(tl.float32)


@triton.jit
def decode_keys(rec, tok, channel, mask, Q: tl.constexpr, BITS: tl.constexpr, E: tl.constexpr, VW: tl.constexpr,
                K_CODES: tl.constexpr, SCALARS: tl.constexpr, CHANNEL: tl.constexpr, TOKEN: tl.constexpr,
                EXACT: tl.constexpr, EXACT_AT: tl.constexpr):
    """K_hat of tokens tok [R]: four quarters [R, Q] float32, channels in the order `channel`; zeros where not
    `mask`.
    """
    scalars = (rec + SCALARS).to(tl.pointer_type(tl.float32))
    at = rec + K_CODES + tok[:, None] * (Q * BITS // 2) + exchanged(channel)[None, :]
    q = load_planes(at, mask[:, None], Q, BITS)
    word = tl.load((rec + TOKEN).to(tl.pointer_type(tl.int32)) + tok, mask=mask, other=0)
    kt = half_pair(word)[0].to(tl.float32)[:, None]
    out = ()
    for i in tl.static_range(4):
        ks, kz = half_pair(tl.load((rec + CHANNEL).to(tl.pointer_type(tl.int32)) + i * Q + channel))
        x = (q[i] * ks.to(tl.float32)[None, :] + kz.to(tl.float32)[None, :]) * kt
        for e in tl.static_range(E):
            hit = (tok == tl.load(rec + EXACT_AT + e).to(tl.int32)) & mask
            row = tl.load((rec + EXACT).to(tl.pointer_type(tl.int16)) + (e * 4 + i) * Q + channel)
            row = word_key(row, VW).to(tl.float32) * tl.load(scalars + 2 + 2 * e)
            x += tl.where(hit[:, None], row[None, :], 0.0)
        out = out + (x,)
    return out


@triton.jit
def decode_values(rec, tok, channel, mask, G: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, E: tl.constexpr,
                  VW: tl.constexpr, V_CODES: tl.constexpr, SCALARS: tl.constexpr, TOKEN: tl.constexpr, W: tl.constexpr,
                  M: tl.constexpr, EXACT: tl.constexpr, EXACT_AT: tl.constexpr):
    """V_hat of tokens tok [R]: four quarters [R, Q] float32, channels in the order `channel`; zeros where not
    `mask`.
    """
    scalars = (rec + SCALARS).to(tl.pointer_type(tl.float32))
    half: tl.constexpr = (2**BITS - 1) / 2
    at = rec + V_CODES + channel[None, :] * G + exchanged(tok)[:, None]
    q = load_planes(at, mask[:, None], Q * G, BITS)
    vt, w = value_scales(rec, tok, mask, BITS, SCALARS, TOKEN, W)
    out = ()
    for i in tl.static_range(4):
        m = from_e4m3(tl.load(rec + M + i * Q + channel).to(tl.int32))
        x = (q[i] - half) * vt[:, None] + w[:, None] * m[None, :]
        for e in tl.static_range(E):
            hit = (tok == tl.load(rec + EXACT_AT + e).to(tl.int32)) & mask
            row = tl.load((rec + EXACT).to(tl.pointer_type(tl.int16)) + (e * 4 + i) * Q + channel)
            row = word_value(row, VW).to(tl.float32) * tl.load(scalars + 3 + 2 * e)
            x += tl.where(hit[:, None], row[None, :], 0.0)
        out = out + (x,)
    return out


@triton.jit
def value_scales(rec, tok, mask, BITS: tl.constexpr, SCALARS: tl.constexpr, TOKEN: tl.constexpr, W: tl.constexpr):
    """vt, w of tokens tok [R], float32."""
    word = tl.load((rec + TOKEN).to(tl.pointer_type(tl.int32)) + tok, mask=mask, other=0)
    units = (rec + SCALARS).to(tl.pointer_type(tl.float32))
    if BITS > 2:
        vt = half_pair(word)[1].to(tl.float32)
        w = from_e4m3(tl.load(rec + W + tok, mask=mask, other=0).to(tl.int32))
    else:
        vt, w = from_e4m3(word >> 16), from_e4m3(word >> 24)
    return vt * tl.load(units), w * tl.load(units + 1)
