"""Which positions a query sees, inside kernels: the mask of a decode, or the staircase of a step's own tokens."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def bias(mask, m_b, m_h, m_n, m_s, group, n, blocks, start, offset, first, last, least, window, sparse,
         MP: tl.constexpr, MASKED: tl.constexpr, ADDITIVE: tl.constexpr, ROWS: tl.constexpr):
    """What is added to the scores of positions start + offset [R], in log2 units: [R, 1], or [R, MP] with ROWS.

    A position outside first..last - 1 is hidden from all. With MASKED the mask of the KV head of this program decides,
    if it is `sparse`; else, with ROWS, query r sees the `window` positions before `least + r // group`. Everything is
    made here from what costs no register to keep: most tiles never come by.
    """
    pos = start + offset
    seen = ((pos >= first) & (pos < last))[:, None]
    mp = tl.program_id(1) % blocks * MP + tl.arange(0, MP)
    if MASKED:
        at, read = offset[:, None] * m_s, seen & (sparse != 0)
        source = mask + tl.program_id(2).to(tl.int64) * m_b + tl.program_id(1) // blocks * (m_h * group)
        source += tl.cast(start, tl.int64) * m_s
        if ROWS:
            at = at + ((mp % group) * m_h + tl.minimum(mp // group, n - 1) * m_n)[None, :]
            read = read & (mp >= 0)[None, :]
        if ADDITIVE:
            value = tl.load(source + at, mask=read, other=0.0).to(tl.float32)
            value = tl.where(value == float("-inf"), value, tl.maximum(value * LOG2E, -1e38))
        else:
            value = tl.where(tl.load(source + at, mask=read, other=1) != 0, 0.0, float("-inf"))
        return tl.where(seen, value, float("-inf"))
    else:
        if ROWS:
            end = (least + mp // group)[None, :]
            seen = seen & (pos[:, None] < end) & (pos[:, None] >= end - window)
        return tl.where(seen, 0.0, float("-inf"))


@triton.jit
def soften(score, cap, SOFTCAP: tl.constexpr):
    """cap * tanh(score / cap)."""
    if SOFTCAP:
        return cap - (2.0 * cap) / (tl.exp2(score * (2.0 * LOG2E / cap)) + 1.0)
    else:
        return score
