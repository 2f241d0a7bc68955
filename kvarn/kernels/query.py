"""The query of a KV head's group into the store frame, inside kernels: one plane of channels per plane of codes."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl

from kvarn.kernels.bits import of_half
from kvarn.kernels.flight import together


@triton.jit
def query_planes(q, rows, used, balance, hadamard, scale, PK: tl.constexpr, DK: tl.constexpr, KB: tl.constexpr,
                 ASM: tl.constexpr):
    """(q / balance) H * scale, transposed: of the channels of lower bytes, then of those of upper ones (bits.of_half),
    PK planes [DK / 2, MP] float16, plane i times 2^(8 - KB - i KB) (decode.py).

    q [...] model dtype at offsets rows [MP], zeros where not `used`; balance [PK * DK] float32; hadamard [DK, DK]
    float16.
    H = H_PK x H_DK: a product with the matrix of signs for each plane, the query's upper and lower bits apart, then a
    butterfly over the planes.
    """
    dk, pair = tl.arange(0, DK), tl.arange(0, DK // 2)
    low = tl.load(hadamard + of_half(pair, 0)[:, None] * DK + dk[None, :])
    high = tl.load(hadamard + of_half(pair, 1)[:, None] * DK + dk[None, :])
    x, scales, y, z = (), (), (), ()
    for i in tl.static_range(PK):
        x = x + (tl.load(q + rows[None, :] + i * DK + dk[:, None], mask=used[None, :], other=0.0),)
        scales = scales + (tl.load(balance + i * DK + dk),)
    low, high = together((low, high), ASM)
    x, scales = together(x, ASM), together(scales, ASM)
    parts = ()
    for i in tl.static_range(PK):
        factor = (scale * (PK * DK) ** -0.5) / scales[i]
        part = x[i].to(tl.float32) * factor[:, None]
        upper = part.to(tl.float16)
        parts = parts + (upper, (part - upper.to(tl.float32)).to(tl.float16))
    parts = together(parts, ASM)
    for i in tl.static_range(PK):
        y = y + (tl.dot(low, parts[2 * i], tl.dot(low, parts[2 * i + 1])),)
        z = z + (tl.dot(high, parts[2 * i], tl.dot(high, parts[2 * i + 1])),)
    return mixed(y, PK, KB), mixed(z, PK, KB)


@triton.jit
def mixed(y, PK: tl.constexpr, KB: tl.constexpr):
    """H_PK over planes, as query_planes returns them."""
    if PK == 2:
        y = y[0] + y[1], y[0] - y[1]
    if PK == 4:
        a0, a1, a2, a3 = y[0] + y[1], y[0] - y[1], y[2] + y[3], y[2] - y[3]
        y = a0 + a2, a1 + a3, a0 - a2, a1 - a3
    planes = ()
    for i in tl.static_range(PK):
        x = y[i] * 2.0 ** (8 - KB - i * KB)
        planes = planes + (tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16),)
    return planes
