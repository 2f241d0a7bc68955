"""The Hadamard rotation of a tile held as quarters, inside kernels. H = H^T = H^-1 with entries +-D^-1/2."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl


@triton.jit
def signs(rows, columns):
    """(-1)^popcount(i & j) as float32 [rows, columns] for indices < 128: the Sylvester-Hadamard matrix."""
    x = rows[:, None] & columns[None, :]
    x = x ^ (x >> 4)
    x = x ^ (x >> 2)
    x = x ^ (x >> 1)
    return 1.0 - 2.0 * (x & 1).to(tl.float32)


@triton.jit
def butterfly(a, Q: tl.constexpr):
    """H_4 over four quarters, scaled by D^-1/2 = (4 Q)^-1/2."""
    s: tl.constexpr = (4 * Q) ** -0.5
    b = unscaled_butterfly(a)
    return b[0] * s, b[1] * s, b[2] * s, b[3] * s


@triton.jit
def unscaled_butterfly(a):
    """Signs of H_4 over four quarters."""
    b0, b1, b2, b3 = a[0] + a[1], a[0] - a[1], a[2] + a[3], a[2] - a[3]
    return b0 + b2, b1 + b3, b0 - b2, b1 - b3


@triton.jit
def rotate(x, columns, Q: tl.constexpr):
    """Quarters x [R, Q], R >= 16, times H, float32; each quarter's channels leave in the order `columns` [Q]."""
    h = signs(tl.arange(0, Q), columns)
    return butterfly((times(x[0], h, 1), times(x[1], h, 1), times(x[2], h, 1), times(x[3], h, 1)), Q)


@triton.jit
def rotate_scaled(x, scale, columns, Q: tl.constexpr):
    """As rotate, channels first multiplied by the vector [D] float32 at `scale`."""
    h, at = signs(tl.arange(0, Q), columns) * (4 * Q) ** -0.5, tl.arange(0, Q)
    a0 = times(x[0], h * tl.load(scale + at)[:, None], 2)
    a1 = times(x[1], h * tl.load(scale + Q + at)[:, None], 2)
    a2 = times(x[2], h * tl.load(scale + 2 * Q + at)[:, None], 2)
    a3 = times(x[3], h * tl.load(scale + 3 * Q + at)[:, None], 2)
    return unscaled_butterfly((a0, a1, a2, a3))


@triton.jit
def rotate_one(x, scale, SCALED: tl.constexpr, Q: tl.constexpr):
    """One row [D] of any float type at `x`, with SCALED times the vector [D] float32 at `scale`, times H: four quarters
    [Q] float32.
    """
    h, at, a = signs(tl.arange(0, Q), tl.arange(0, Q)), tl.arange(0, Q), ()
    for i in tl.static_range(4):
        part = tl.load(x + i * Q + at).to(tl.float32)
        if SCALED:
            part *= tl.load(scale + i * Q + at)
        a = a + (tl.sum(part[:, None] * h, axis=0),)
    return butterfly(a, Q)


@triton.jit
def times(x, h, PARTS: tl.constexpr):
    """x [R, Q] of any float type times h [Q, Q] float32, nearly to float32's precision.

    A 16-bit x multiplies h in its own type: with PARTS 1 if that holds all of h (+-1), with PARTS 2 h's upper and lower
    bits apart. A float32 x takes three TF32 products.
    """
    if x.dtype == tl.float32:
        return tl.dot(x, h, input_precision="tf32x3")
    else:
        upper = h.to(x.dtype)
        product = tl.zeros(x.shape, tl.float32)
        if PARTS == 2:
            product = tl.dot(x, (h - upper.to(tl.float32)).to(x.dtype))
        return tl.dot(x, upper, product)


@triton.jit
def rotate_back(x, rows, Q: tl.constexpr):
    """Quarters x [R, Q] whose channels come in the order `rows` times H, in natural order."""
    h = signs(rows, tl.arange(0, Q))
    a0 = tl.dot(x[0], h, input_precision="tf32x3")
    a1 = tl.dot(x[1], h, input_precision="tf32x3")
    a2 = tl.dot(x[2], h, input_precision="tf32x3")
    a3 = tl.dot(x[3], h, input_precision="tf32x3")
    return butterfly((a0, a1, a2, a3), Q)
