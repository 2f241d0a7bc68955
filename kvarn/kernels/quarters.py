"""A tile held as four quarters [R, D / 4] inside kernels: loading, choosing, cleaning."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import finite


@triton.jit
def square_sum(x):
    """Sum of squares over the channels of four quarters [R, Q]: [R]."""
    return tl.sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3], axis=1)


@triton.jit
def row_of(x, hit):
    """The one row of four quarters [R, Q] where `hit` [R]: four vectors [Q]."""
    m = hit[:, None]
    return (tl.sum(tl.where(m, x[0], 0.0), axis=0), tl.sum(tl.where(m, x[1], 0.0), axis=0),
            tl.sum(tl.where(m, x[2], 0.0), axis=0), tl.sum(tl.where(m, x[3], 0.0), axis=0))


@triton.jit
def select(mask, x, y):
    """Rows of x where `mask` [R], else of y; four quarters each."""
    m = mask[:, None]
    return tl.where(m, x[0], y[0]), tl.where(m, x[1], y[1]), tl.where(m, x[2], y[2]), tl.where(m, x[3], y[3])


@triton.jit
def finite4(x):
    """finite() of four quarters, and their rows' squared lengths, which tell whether there is anything to do."""
    length = square_sum(x)
    if tl.min((length < 65504.0 * 65504.0).to(tl.int32), axis=0) == 0:
        x = finite(x[0]), finite(x[1]), finite(x[2]), finite(x[3])
        length = square_sum(x)
    return x, length


@triton.jit
def finite_row(x):
    """finite() of four quarters of one row, [Q] each."""
    return finite(x[0]), finite(x[1]), finite(x[2]), finite(x[3])


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
