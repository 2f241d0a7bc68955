"""A tile held as four quarters [R, D / 4] inside kernels: loading, joining, choosing, cleaning."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import finite


@triton.jit
def joined(x):
    """Four tensors [...] as one [..., 2, 2], the i-th at i // 2, i % 2: what was in a thread stays there."""
    return tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))


@triton.jit
def parted(x):
    """The inverse of joined."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def select(mask, x, y, AXIS: tl.constexpr):
    """Tokens of x where `mask`, else of y; four quarters each, with channels along AXIS."""
    m = tl.expand_dims(mask, AXIS)
    return tl.where(m, x[0], y[0]), tl.where(m, x[1], y[1]), tl.where(m, x[2], y[2]), tl.where(m, x[3], y[3])


@triton.jit
def unclean(length):
    """Whether some of the squared lengths [R] is of a vector that may hold what finite() changes."""
    return tl.min((length < 65504.0 * 65504.0).to(tl.int32), axis=0) == 0


@triton.jit
def finite_rows(x):
    """finite() of four quarters [R, Q], if there is anything to do."""
    if unclean(tl.sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3], axis=1)):
        x = finite(x[0]), finite(x[1]), finite(x[2]), finite(x[3])
    return x


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
