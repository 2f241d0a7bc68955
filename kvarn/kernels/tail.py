"""Nearly exact tokens inside kernels: the words of kvarn/words.py, in a tail or in pages.

`tail` is one head's tail, uint8, or a pointer per token [R]: each to the tail or page that holds the token.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import nearest
from kvarn.kernels.quarters import load_at


@triton.jit
def word_scale(x, BITS: tl.constexpr):
    """The scale of one side of a token's words, over the last axis of four quarters: float32 with float16's value."""
    top = tl.maximum(tl.maximum(tl.abs(x[0]), tl.abs(x[1])), tl.maximum(tl.abs(x[2]), tl.abs(x[3])))
    return scale_of(tl.max(top, axis=len(top.shape) - 1), BITS)


@triton.jit
def scale_of(top, BITS: tl.constexpr):
    """The scale of words whose largest magnitude is `top`."""
    return tl.minimum(top / (2 ** (BITS - 1) - 1), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def word_code(x, scale, BITS: tl.constexpr):
    """x over its scale, rounded: int32 in -(2^(BITS-1) - 1)..2^(BITS-1) - 1."""
    top: tl.constexpr = 2 ** (BITS - 1) - 1
    x = x * (1.0 / tl.maximum(scale, 1e-8))
    return nearest(tl.minimum(tl.maximum(x, -1.0 * top), 1.0 * top))


@triton.jit
def word_key(word, VW: tl.constexpr):
    """The key in int16 words, int32."""
    return word.to(tl.int32) >> VW


@triton.jit
def word_value(word, VW: tl.constexpr):
    """The value in int16 words, int32."""
    return (word.to(tl.int32) << (32 - VW)) >> (32 - VW)


@triton.jit
def read_tail_keys(tail, tok, channel, mask, Q: tl.constexpr, VW: tl.constexpr, WORDS: tl.constexpr,
                   K_SCALE: tl.constexpr):
    """Keys of slots tok [R]: four quarters [R, Q] float32, channels in the order `channel`; zeros where not `mask`."""
    x, scale = tail_keys(tail, tok, channel, mask, Q, VW, WORDS, K_SCALE)
    return scaled(x, scale[:, None])


@triton.jit
def read_tail_values(tail, tok, channel, mask, Q: tl.constexpr, VW: tl.constexpr, WORDS: tl.constexpr,
                     V_SCALE: tl.constexpr):
    """Values, likewise."""
    x, scale = tail_values(tail, tok, channel, mask, Q, VW, WORDS, V_SCALE)
    return scaled(x, scale[:, None])


@triton.jit
def tail_keys(tail, tok, channel, mask, Q: tl.constexpr, VW: tl.constexpr, WORDS: tl.constexpr, K_SCALE: tl.constexpr):
    """The same as integers, exact in float16, and their scales [R] float32."""
    x = load_at((tail + WORDS).to(tl.pointer_type(tl.int16)) + tok * (4 * Q), channel, mask, Q)
    scale = tl.load((tail + K_SCALE).to(tl.pointer_type(tl.float16)) + tok, mask=mask, other=0.0)
    return (word_key(x[0], VW).to(tl.float16), word_key(x[1], VW).to(tl.float16), word_key(x[2], VW).to(tl.float16),
            word_key(x[3], VW).to(tl.float16)), scale.to(tl.float32)


@triton.jit
def tail_values(tail, tok, channel, mask, Q: tl.constexpr, VW: tl.constexpr, WORDS: tl.constexpr,
                V_SCALE: tl.constexpr):
    """Likewise."""
    x = load_at((tail + WORDS).to(tl.pointer_type(tl.int16)) + tok * (4 * Q), channel, mask, Q)
    scale = tl.load((tail + V_SCALE).to(tl.pointer_type(tl.float16)) + tok, mask=mask, other=0.0)
    return (word_value(x[0], VW).to(tl.float16), word_value(x[1], VW).to(tl.float16),
            word_value(x[2], VW).to(tl.float16), word_value(x[3], VW).to(tl.float16)), scale.to(tl.float32)


@triton.jit
def scaled(x, scale):
    """Four quarters times their scales, float32."""
    return (x[0].to(tl.float32) * scale, x[1].to(tl.float32) * scale, x[2].to(tl.float32) * scale,
            x[3].to(tl.float32) * scale)


@triton.jit
def write_tail(tail, k, v, slot, mask, Q: tl.constexpr, VW: tl.constexpr, WORDS: tl.constexpr, K_SCALE: tl.constexpr,
               V_SCALE: tl.constexpr):
    """Store tokens k, v (four quarters [R, Q] each, finite, natural channel order) at `slot` (one of several tails, or
    [R]) where `mask` [R].
    """
    k_scale, v_scale = word_scale(k, 16 - VW), word_scale(v, VW)
    row = (tail + WORDS).to(tl.pointer_type(tl.int16)) + slot * (4 * Q)
    at = row[:, None] + tl.arange(0, Q)[None, :]
    for i in tl.static_range(4):
        word = word_code(k[i], k_scale[:, None], 16 - VW) << VW
        word = word | (word_code(v[i], v_scale[:, None], VW) & (2**VW - 1))
        tl.store(at + i * Q, word.to(tl.int16), mask=mask[:, None])
    tl.store((tail + K_SCALE).to(tl.pointer_type(tl.float16)) + slot, k_scale.to(tl.float16), mask=mask)
    tl.store((tail + V_SCALE).to(tl.pointer_type(tl.float16)) + slot, v_scale.to(tl.float16), mask=mask)
