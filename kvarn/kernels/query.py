"""The query of a KV head's group into the store frame, inside kernels: one plane of channels per plane of codes."""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false  (Triton's jit is untyped)

import triton
import triton.language as tl


@triton.jit
def query_planes(q, rows, used, balance, signs, scale, PK: tl.constexpr, DK: tl.constexpr, KB: tl.constexpr):
    """(q / balance) H * scale, transposed: PK planes [DK, MP] float16, plane i times 2^(8 - KB - i KB) (decode.py).

    q [...] model dtype at offsets rows [MP], zeros where not `used`; balance [PK * DK] float32; signs [DK, DK] float16.
    H = H_PK x H_DK: a product with the matrix of signs for each plane, the query's upper and lower bits apart, then a
    butterfly over the planes.
    """
    dk = tl.arange(0, DK)
    h = tl.load(signs + dk[:, None] * DK + dk[None, :])
    y = ()
    for i in tl.static_range(PK):
        x = tl.load(q + rows[None, :] + i * DK + dk[:, None], mask=used[None, :], other=0.0).to(tl.float32)
        factor = (scale * (PK * DK) ** -0.5) / tl.load(balance + i * DK + dk)
        x = x * factor[:, None]
        upper = x.to(tl.float16)
        y = y + (tl.dot(h, upper, tl.dot(h, (x - upper.to(tl.float32)).to(tl.float16))),)
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
