"""Where a paged store's tokens are, inside kernels: rows of a step, blocks of a table (kvarn/paged_layout.py)."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.quarters import finite_rows, load_at
from kvarn.kernels.rotation import rotate
from kvarn.kernels.tail import write_tail


@triton.jit
def row_of_token(starts, token, B, steps):
    """The row b with starts[b] <= token [R] < starts[b + 1], if there is one: binary search in `steps` steps."""
    low, high = token * 0, token * 0 + B
    for _ in range(0, steps):
        middle = (low + high) // 2
        before = tl.load(starts + middle).to(tl.int32) <= token
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low


@triton.jit
def row_extent(starts, ends, b, mask):
    """Of rows b: their first token's index in the step, its position, the position after their last token."""
    start = tl.load(starts + b, mask=mask, other=0).to(tl.int32)
    stop = tl.load(starts + b + 1, mask=mask, other=0).to(tl.int32)
    end = tl.load(ends + b, mask=mask, other=0).to(tl.int32)
    return start, end - (stop - start), end


@triton.jit
def open_from(end, G: tl.constexpr, PAGE: tl.constexpr):
    """The first position whose token a write that ends before `end` puts into pages: its last tile's first, or the
    tile's before where the last one is not full and its tokens fit a page.
    """
    last = tl.maximum(end - 1, 0) // G
    fill = end - last * G
    return (last - ((fill <= PAGE) & (fill < G)).to(tl.int32)) * G


@triton.jit
def page_of(cache, blocks, tile, slot, mask, c_b, PAGE: tl.constexpr, SPARE: tl.constexpr):
    """The block of a row's table `blocks` that holds token `slot` of its open tile: a pointer each, as slot."""
    block = tl.load(blocks + tile + SPARE - slot // PAGE, mask=mask, other=0)
    return cache + block.to(tl.int64) * c_b


@triton.jit
def write_pages(
    k, v, token, head, blocks, position, mask, cache, balance, k_t, k_h, v_t, v_h, c_b, c_h,
    G: tl.constexpr, Q: tl.constexpr, VW: tl.constexpr, WORDS: tl.constexpr, K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr, PAGE: tl.constexpr, SPARE: tl.constexpr,
):
    """Heads `head` [R] of tokens `token` [R] of k, v [n, H, D] into the pages of their positions [R], where `mask`;
    `blocks`: the table of the row, or [R] of each token's.
    """
    natural, token = tl.arange(0, Q), token.to(tl.int64)
    x = load_at(k + token * k_t + head * k_h, natural, mask, Q)
    s = load_at(balance + head * (4 * Q), natural, mask, Q)
    x = rotate((x[0].to(tl.float32) * s[0], x[1].to(tl.float32) * s[1], x[2].to(tl.float32) * s[2],
                x[3].to(tl.float32) * s[3]), natural, Q)
    y = rotate(load_at(v + token * v_t + head * v_h, natural, mask, Q), natural, Q)
    slot = position % G
    page = page_of(cache, blocks, position // G, slot, mask, c_b, PAGE, SPARE) + head * c_h
    write_tail(page, finite_rows(x), finite_rows(y), slot % PAGE, mask, Q, VW, WORDS, K_SCALE, V_SCALE)
