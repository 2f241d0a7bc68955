"""A tile to its record and back inside kernels. The formulas are kvarn/closed.py's.

`rec` is one record, uint8; offsets (upper case) are kvarn/layout.py's, by way of configs.offsets. Keys enter with each
quarter's channels in `exchanged` order, values with the tile's tokens in that order: packed bytes are then contiguous.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import exchanged, from_e4m3, half_pair
from kvarn.kernels.tail import word_key, word_value


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
            tl.store(out + (i - 2) * QUARTER, (packed[i - 2] + (code << 4)).to(tl.uint8))
    elif i == 0:
        packed = (code,)
    else:
        packed = (packed[0] + (code << (2 * i)),)
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
