"""Bits to numbers and back, for use inside kernels: packed codes, e4m3 bytes, rounding to even."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

CODE_UNIT = tl.constexpr(2.0**-24)
"""A code c under mask c << s reads as c * 2^s * CODE_UNIT: a subnormal float16, exact, with no offset to take off."""


@triton.constexpr_function
def _mask_pairs(shift: int, mask: int) -> str:
    both = hex(mask | mask << 16)
    return f"shr.u32 $0, $1, {shift}; and.b32 $0, $0, {both};" if shift else f"and.b32 $0, $1, {both};"


@triton.jit
def codes(pairs, HALF: tl.constexpr, MASK: tl.constexpr, ASM: tl.constexpr):
    """int16 pairs of bytes to float16 (byte & MASK) * CODE_UNIT of the lower (HALF 0) or upper bytes.

    Bytes come in twos, as a matrix product's operand of 16 bits has them: with single bytes Triton has an operand of
    four in a row, and then the other operand's registers, in twos too, need a move each before a product takes them.
    """
    if ASM:
        return tl.inline_asm_elementwise(_mask_pairs(8 * HALF, MASK), "=r,r", [pairs], dtype=tl.float16, is_pure=True,
                                         pack=2)
    else:
        return ((pairs >> (8 * HALF)) & MASK).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def of_half(index, half):
    """What lies in the lower (0) or upper (1) byte of pair `index`: of four bytes, entries 1 and 2 are exchanged."""
    return (index & ~1) * 2 + (index & 1) + 2 * half


@triton.jit
def halves(x):
    """The entries of x [..., N] of all lower bytes and those of all upper ones, [..., N / 2] each."""
    shape: tl.constexpr = x.shape
    if len(shape) == 1:
        x = tl.permute(tl.reshape(x, (shape[0] // 4, 2, 2)), (0, 2, 1))
        low, high = tl.split(x)
        return tl.reshape(low, (shape[0] // 2,)), tl.reshape(high, (shape[0] // 2,))
    else:
        x = tl.permute(tl.reshape(x, (shape[0], shape[1] // 4, 2, 2)), (0, 1, 3, 2))
        low, high = tl.split(x)
        return tl.reshape(low, (shape[0], shape[1] // 2)), tl.reshape(high, (shape[0], shape[1] // 2))


@triton.jit
def exchanged(index):
    """Where entry `index` lies when entries 1 and 2 of every four are exchanged; its own inverse."""
    return (index & ~3) | ((index & 1) << 1) | ((index >> 1) & 1)


@triton.jit
def from_e4m3(byte):
    """An e4m3 byte (any integer dtype, low 8 bits) as float32: the same bits in a float16, 2^8 too small."""
    half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def from_e4m3_bytes(x, ASM: tl.constexpr):
    """e4m3 bytes, uint8, as float32; with ASM > 1 a thread has four of them or a multiple."""
    if ASM > 1:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 x, y; mov.b32 {x, y}, $2; cvt.rn.f16x2.e4m3x2 $0, x; cvt.rn.f16x2.e4m3x2 $1, y; }",
            "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4).to(tl.float32)
    else:
        return from_e4m3(x.to(tl.int32))


@triton.jit
def e4m3_pair(word, ASM: tl.constexpr):
    """The e4m3 bytes 2 (never negative) and 3 of a 32-bit word as float32."""
    if ASM > 1:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 x, y; .reg .b32 h; mov.b32 {x, y}, $2; cvt.rn.f16x2.e4m3x2 h, y; mov.b32 {x, y}, h; "
            "cvt.f32.f16 $0, x; cvt.f32.f16 $1, y; }", "=f,=f,r", [word], dtype=(tl.float32, tl.float32), is_pure=True,
            pack=1)
    else:
        low = (word >> 9) & 0x3F80
        high = ((word >> 16) & 0x8000) | ((word >> 17) & 0x3F80)
        return (low.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0,
                high.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0)


@triton.jit
def to_e4m3(x):
    """float32 to the nearest e4m3, ties to even, saturating at +-448: int32 with the byte in its low bits."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    tiny = nearest(magnitude * 512.0)
    code = tl.where(magnitude < 0.015625, tiny, normal)
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def at_nearest(x):
    """|x| < 2^22 to the nearest integer, ties to even, plus 1.5 * 2^23: there a float32 has no fraction bits, and its
    low byte is that of the integer. (Conversions run at a quarter of an addition's rate.)
    """
    return x + 12582912.0


@triton.jit
def number_at(x):
    """The integer in at_nearest's result, float32."""
    return x - 12582912.0


@triton.jit
def nearest(x):
    """|x| < 2^22 to the nearest integer, ties to even, int32."""
    return at_nearest(x).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def half_bits(x):
    """float32 rounded to float16, as its bits in an int32."""
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def half_pair(word):
    """The low and the high half of a 32-bit word, each as float16."""
    low, high = word.to(tl.uint16), (word >> 16).to(tl.uint16)
    return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)


@triton.jit
def half_upward(x):
    """Non-negative float32 rounded up to float16, saturating at 65504."""
    y = tl.minimum(x, 65504.0).to(tl.float16)
    bits = y.to(tl.int16, bitcast=True)
    short = (y.to(tl.float32) < x) & (bits < 0x7BFF)
    return (bits + short.to(tl.int16)).to(tl.float16, bitcast=True)


@triton.jit
def finite(x):
    """NaN as zero, magnitudes up to float16's largest value."""
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0)
