"""A tile held as four quarters [R, D / 4] inside kernels: loading, choosing, cleaning."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import finite


@triton.jit
def folded(x):
    """Rows of x [Q, G] that lie eight apart summed, [8, G]: those of one thread, so that nothing is exchanged."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 8, 8, x.shape[1])), axis=0)


@triton.jit
def square_sum(x, AXIS: tl.constexpr):
    """Sum of squares over the channels, axis AXIS of four quarters: a number a token."""
    return tl.sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3], axis=AXIS)


@triton.jit
def joined(x):
    """Four tensors [...] as one [..., 2, 2]: one reduction, and one exchange between warps, instead of four."""
    return tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))


@triton.jit
def parted(x):
    """The inverse of joined."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def spread(x, finite, N: tl.constexpr):
    """The numbers of x, of any shape, in a row, a few a thread; `finite` points at N finite float32.

    What a matrix is reduced to stays where the reduction left it, in many threads at once, and all of them would go on
    with it. A load has a layout of its own, without copies, and the compiler keeps to it in what is made of the load.
    """
    size: tl.constexpr = x.numel
    return tl.reshape(x, (size,)) + 0.0 * tl.load(finite + tl.arange(0, size) % N)


@triton.jit
def select(mask, x, y, AXIS: tl.constexpr):
    """Tokens of x where `mask`, else of y; four quarters each, with channels along AXIS."""
    m = tl.expand_dims(mask, AXIS)
    return tl.where(m, x[0], y[0]), tl.where(m, x[1], y[1]), tl.where(m, x[2], y[2]), tl.where(m, x[3], y[3])


@triton.jit
def finite4(x, AXIS: tl.constexpr):
    """finite() of four quarters with channels along AXIS, and their tokens' squared lengths, which tell whether there
    is anything to do.
    """
    length = square_sum(x, AXIS)
    if tl.min((length < 65504.0 * 65504.0).to(tl.int32), axis=0) == 0:
        x = finite(x[0]), finite(x[1]), finite(x[2]), finite(x[3])
        length = square_sum(x, AXIS)
    return x, length


@triton.jit
def load_rows(x, stride_t, row, channel, mask, Q: tl.constexpr):
    """Rows of a [n, D] matrix, each quarter's channels in the order `channel`: four quarters [R, Q] in its own type;
    zeros where not `mask` [R].
    """
    return load_at(x + row.to(tl.int64) * stride_t, channel, mask, Q)


@triton.jit
def load_at(rows, channel, mask, Q: tl.constexpr):
    """As load_rows, of rows [R] that lie anywhere: pointers to their first entries."""
    at, mask = rows[:, None] + channel[None, :], mask[:, None]
    return (tl.load(at, mask=mask, other=0), tl.load(at + Q, mask=mask, other=0),
            tl.load(at + 2 * Q, mask=mask, other=0), tl.load(at + 3 * Q, mask=mask, other=0))


@triton.constexpr_function
def _same(x):
    return (x.dtype,) * 4


@triton.jit
def together(x, ASM: tl.constexpr):
    """Four loaded tensors of 16-bit numbers as they are, but the first is not used before the last is on its way.

    Triton brings what becomes a matrix product's operand to shared memory right after its load, and waits for it there:
    four times as long as for all of them. The inline assembly does nothing, to all four at once; were it pure, Triton
    would move it behind that.
    """
    if ASM and x[0].dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
                                         "=&r,=&r,=&r,=&r,r,r,r,r", x, dtype=_same(x[0]), is_pure=False, pack=2)
    else:
        return x
