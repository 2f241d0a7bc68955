"""The Hadamard rotation of a tile held as quarters, inside kernels. H = H^T = H^-1 with entries +-D^-1/2."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import exchanged, finite


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
    """H_4 over four quarters, scaled by D^-1/2 = (4 Q)^-1/2: the second half of the factors are a multiply-add's."""
    s: tl.constexpr = (4 * Q) ** -0.5
    b0, b1, b2, b3 = (a[0] + a[1]) * s, (a[0] - a[1]) * s, a[2] + a[3], a[2] - a[3]
    return b0 + b2 * s, b1 + b3 * s, b0 - b2 * s, b1 - b3 * s


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
def rotate_across(x, Q: tl.constexpr):
    """Quarters x [R, Q] times H as [Q, R], float32, each quarter's channels `exchanged`."""
    return butterfly((across_times(x[0], 0, 0, "signs", Q), across_times(x[1], 0, 0, "signs", Q),
                      across_times(x[2], 0, 0, "signs", Q), across_times(x[3], 0, 0, "signs", Q)), Q)


@triton.jit
def rotate_scaled_across(x, scale, Q: tl.constexpr):
    """As rotate_across, channels first multiplied by the vector [D] float32 at `scale`; if that is ones, without the
    second product that its lower bits take.
    """
    if tl.min((tl.load(scale + tl.arange(0, 4 * Q)) == 1.0).to(tl.int32), axis=0) > 0:
        y = rotate_across(x, Q)
    else:
        y = unscaled_butterfly((
            across_times(x[0], scale, 0, "scaled", Q), across_times(x[1], scale + Q, 0, "scaled", Q),
            across_times(x[2], scale + 2 * Q, 0, "scaled", Q), across_times(x[3], scale + 3 * Q, 0, "scaled", Q)))
    return y


@triton.jit
def turned(x, Q: tl.constexpr):
    """Quarters x [R, Q] of float16 or float32 as [Q, R], float32, each quarter's channels `exchanged`. A product with
    the identity, so that they come in the layout in which rotate_across leaves others.
    """
    return (across_times(x[0], 0, 0, "identity", Q), across_times(x[1], 0, 0, "identity", Q),
            across_times(x[2], 0, 0, "identity", Q), across_times(x[3], 0, 0, "identity", Q))


@triton.jit
def across_times(x, scale, start: tl.constexpr, MATRIX: tl.constexpr, Q: tl.constexpr):
    """Rows `start`.. of a matrix [Q, Q], `exchanged`, times the transpose of x [R, Q], as `times`: of signs, of signs
    times D^-1/2 and the vector [Q] float32 at `scale` ("scaled"), or of the identity. 32 rows at a time: of these every
    warp has all for tokens of its own, while more would be shared out among warps.
    """
    rows: tl.constexpr = min(Q, 32)
    row, at = exchanged(start + tl.arange(0, rows)), tl.arange(0, Q)
    if MATRIX == "identity":
        h = (row[:, None] == at[None, :]).to(tl.float32)
    else:
        h = signs(row, at)
    if MATRIX == "scaled":
        h *= tl.load(scale + at)[None, :] * (4 * Q) ** -0.5
    columns = tl.trans(x)
    if (x.dtype == tl.float32) & (MATRIX == "identity"):  # its upper and lower bits apart
        columns = finite(columns)
        upper = columns.to(tl.float16)
        product = tl.dot(h.to(tl.float16), (columns - upper.to(tl.float32)).to(tl.float16))
        product = tl.dot(h.to(tl.float16), upper, product)
    elif x.dtype == tl.float32:
        product = tl.dot(h, columns, input_precision="tf32x3")
    else:
        upper = h.to(x.dtype)
        product = tl.zeros((rows, x.shape[0]), tl.float32)
        if MATRIX == "scaled":
            product = tl.dot((h - upper.to(tl.float32)).to(x.dtype), columns, product)
        product = tl.dot(upper, columns, product)
    if start + rows < Q:
        more = across_times(x, scale, start + rows, MATRIX, Q)
        product = tl.reshape(tl.permute(tl.join(product, more), (2, 0, 1)), (2 * rows, x.shape[0]))
    return product


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
