"""What a tile is reduced to, inside kernels: a number for each token or channel, in one thread and not in many.

A tile is four quarters [Q, G] of channels by tokens in the layout of a matrix product's result: of `exchanged` tokens a
warp has eight in turn, a thread two of these. A thread first sums what it has itself. Then rows of what is left go
through shared memory, each to one thread, whose sum needs no exchange (or to two neighbours, where a row is longer than
16 numbers or there are more threads than rows). By Triton's own reduction every thread exchanges with others in its
warp, then with those of other warps, and in the end all have the result and would all go on with it.

This is for as many warps to share a tile's tokens as warps() says and configs.fill has. With another number the results
are the same but for the order of sums, and rows are shared out among warps.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import exchanged, finite
from kvarn.kernels.quarters import joined, unclean


@triton.constexpr_function
def warps(Q: int) -> int:
    """Warps that share the tokens of a tile of quarters [Q, G]."""
    return Q // 8


@triton.jit
def a_thread_each(x, readable):
    """x [N] or [N, P] as it is, but a row is one thread's (or two's); `readable` points at 256 bytes of any content.

    A load has a layout of its own, without copies, and Triton keeps to it in what is made of the load. In the end
    nothing is loaded: a byte times zero is zero, as the compiler behind Triton knows.
    """
    if len(x.shape) == 1:
        at = tl.arange(0, x.shape[0])
    else:
        at = tl.arange(0, x.shape[0])[:, None] * x.shape[1] + tl.arange(0, x.shape[1])[None, :]
    return x - 0.0 * tl.load(readable.to(tl.pointer_type(tl.uint8)) + at % 256).to(tl.float32)


@triton.jit
def by_warp(x, Q: tl.constexpr):
    """Numbers x [G] or [P, G] of a tile's tokens as [G] or [G, P], those of a warp together."""
    W: tl.constexpr = warps(Q)
    G: tl.constexpr = x.shape[len(x.shape) - 1]
    if len(x.shape) == 1:
        return tl.reshape(tl.permute(tl.reshape(x, (G // (8 * W), W, 8)), (1, 0, 2)), (G,))
    else:
        x = tl.permute(tl.reshape(x, (x.shape[0], G // (8 * W), W, 8)), (2, 1, 3, 0))
        return tl.reshape(x, (G, x.shape[3]))


@triton.jit
def by_column(x, Q: tl.constexpr):
    """Numbers [G] by_warp in the order of the tile's columns."""
    W: tl.constexpr = warps(Q)
    G: tl.constexpr = x.numel
    return tl.reshape(tl.permute(tl.reshape(x, (W, G // (8 * W), 8)), (1, 0, 2)), (G,))


@triton.jit
def tokens(G: tl.constexpr, Q: tl.constexpr):
    """The tokens of numbers by_warp."""
    return exchanged(by_warp(tl.arange(0, G), Q))


@triton.jit
def flat_channels(Q: tl.constexpr):
    """The channels of numbers [4 Q] that channel_rows' rows become."""
    at = tl.arange(0, 4 * Q)
    return (at & 3) * Q + exchanged(at >> 2)


@triton.jit
def folded(x):
    """Rows of x [Q, G] that lie eight apart summed, [8, G]: those of one thread."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 8, 8, x.shape[1])), axis=0)


@triton.jit
def folded4(x):
    """Of four quarters [Q, G], all in one sum: [8, G]."""
    Q: tl.constexpr = x[0].shape[0]
    G: tl.constexpr = x[0].shape[1]
    y = tl.permute(tl.reshape(joined(x), (Q // 8, 8, G, 4)), (1, 2, 0, 3))
    return tl.sum(tl.reshape(y, (8, G, Q // 2)), axis=2)


@triton.jit
def token_sum(x, readable, Q: tl.constexpr):
    """[G] by_warp: what of a tile is `folded`, [8, G], summed over the rest of the channels."""
    return tl.sum(a_thread_each(by_warp(x, Q), readable), axis=1)


@triton.jit
def finite_tile(x, readable):
    """finite() of four quarters [Q, G], and their tokens' squared lengths [G] by_warp, which tell whether there is
    anything to do.
    """
    Q: tl.constexpr = x[0].shape[0]
    length = token_sum(folded4(squares(x)), readable, Q)
    if unclean(length):
        x = finite(x[0]), finite(x[1]), finite(x[2]), finite(x[3])
        length = token_sum(folded4(squares(x)), readable, Q)
    return x, length


@triton.jit
def squares(x):
    """Four quarters, each entry squared."""
    return x[0] * x[0], x[1] * x[1], x[2] * x[2], x[3] * x[3]


@triton.jit
def of_thread(x):
    """x [Q, G] with the columns of one thread together: [Q, 4 W, G / 4 W] for W warps."""
    Q: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1]
    W: tl.constexpr = warps(Q)
    x = tl.permute(tl.reshape(x, (Q, G // (8 * W), 4 * W, 2)), (0, 2, 1, 3))
    return tl.reshape(x, (Q, 4 * W, G // (4 * W)))


@triton.jit
def channel_rows(x):
    """Four quarters [Q, P] as rows [4 Q, P], of flat_channels."""
    return tl.reshape(tl.permute(joined(x), (0, 2, 3, 1)), (4 * x[0].shape[0], x[0].shape[1]))


@triton.jit
def channel_sum(x, readable):
    """[4 Q], of flat_channels: four quarters [Q, G] summed over tokens."""
    y = (tl.sum(of_thread(x[0]), axis=2), tl.sum(of_thread(x[1]), axis=2),
         tl.sum(of_thread(x[2]), axis=2), tl.sum(of_thread(x[3]), axis=2))
    return tl.sum(a_thread_each(channel_rows(y), readable), axis=1)


@triton.jit
def extremes(x, readable):
    """[4 Q] each, of flat_channels: least and greatest over tokens of four quarters [Q, G], of what is a number."""
    low, high = (), ()
    for i in tl.static_range(4):
        y = of_thread(x[i])
        low, high = low + (tl.min(y, axis=2),), high + (tl.max(y, axis=2),)
    return (tl.min(a_thread_each(channel_rows(low), readable), axis=1),
            tl.max(a_thread_each(channel_rows(high), readable), axis=1))
