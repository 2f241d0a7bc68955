"""Nearly exact tokens inside kernels: the words of kvarn/words.py, in a tail. `tail` is one head's tail, uint8."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import nearest
from kvarn.kernels.quarters import load_rows


@triton.jit
def word_scale(x, BITS: tl.constexpr):
    """The scale of one side of a token's words, over the last axis of four quarters: float32 with float16's value."""
    top = tl.maximum(tl.maximum(tl.abs(x[0]), tl.abs(x[1])), tl.maximum(tl.abs(x[2]), tl.abs(x[3])))
    scale = tl.minimum(tl.max(top, axis=len(top.shape) - 1) / (2 ** (BITS - 1) - 1), 65504.0)
    return scale.to(tl.float16).to(tl.float32)


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
    scale = tl.load((tail + K_SCALE).to(tl.pointer_type(tl.float16)) + tok, mask=mask, other=0.0)
    scale = scale.to(tl.float32)[:, None]
    x = load_rows((tail + WORDS).to(tl.pointer_type(tl.int16)), 4 * Q, tok, channel, mask, Q)
    return (word_key(x[0], VW).to(tl.float32) * scale, word_key(x[1], VW).to(tl.float32) * scale,
            word_key(x[2], VW).to(tl.float32) * scale, word_key(x[3], VW).to(tl.float32) * scale)


@triton.jit
def read_tail_values(tail, tok, mask, Q: tl.constexpr, VW: tl.constexpr, WORDS: tl.constexpr, V_SCALE: tl.constexpr):
    """Values of slots tok [R]: four quarters [R, Q] float32; zeros where not `mask`."""
    scale = tl.load((tail + V_SCALE).to(tl.pointer_type(tl.float16)) + tok, mask=mask, other=0.0)
    scale = scale.to(tl.float32)[:, None]
    x = load_rows((tail + WORDS).to(tl.pointer_type(tl.int16)), 4 * Q, tok, tl.arange(0, Q), mask, Q)
    return (word_value(x[0], VW).to(tl.float32) * scale, word_value(x[1], VW).to(tl.float32) * scale,
            word_value(x[2], VW).to(tl.float32) * scale, word_value(x[3], VW).to(tl.float32) * scale)


@triton.jit
def write_tail(tail, k, v, tok, mask, Q: tl.constexpr, VW: tl.constexpr, WORDS: tl.constexpr, K_SCALE: tl.constexpr,
               V_SCALE: tl.constexpr):
    """Store tokens k, v (four quarters [R, Q] each, finite, natural channel order) at slots tok [R] where `mask`."""
    write_tail_rows(tail, k, v, tok * 0, tok, mask, 0, Q, VW, WORDS, K_SCALE, V_SCALE)


@triton.jit
def write_tail_rows(tail, k, v, head, slot, mask, TAIL: tl.constexpr, Q: tl.constexpr, VW: tl.constexpr,
                    WORDS: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr):
    """Store tokens k, v at `slot` (one, or [R]) of the tails of heads `head` [R], where `mask`."""
    k_scale, v_scale = word_scale(k, 16 - VW), word_scale(v, VW)
    own = tail + head * TAIL
    row = (own + WORDS).to(tl.pointer_type(tl.int16)) + slot * (4 * Q)
    at = row[:, None] + tl.arange(0, Q)[None, :]
    for i in tl.static_range(4):
        word = word_code(k[i], k_scale[:, None], 16 - VW) << VW
        word = word | (word_code(v[i], v_scale[:, None], VW) & (2**VW - 1))
        tl.store(at + i * Q, word.to(tl.int16), mask=mask[:, None])
    tl.store((own + K_SCALE).to(tl.pointer_type(tl.float16)) + slot, k_scale.to(tl.float16), mask=mask)
    tl.store((own + V_SCALE).to(tl.pointer_type(tl.float16)) + slot, v_scale.to(tl.float16), mask=mask)
