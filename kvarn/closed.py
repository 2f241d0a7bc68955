"""The record of method "kvarn": closed-form normalization and unbiased rounding of one tile, K [G, D] and V [G, D].

    keys    kt[t] = rms over channels;  u = K / kt;  per channel kz = min u, ks = (max u - kz) / (2^b - 1) rounded up
            K_hat[t,d] = (q[t,d] * ks[d] + kz[d]) * kt[t]
    values  m = mean over tokens of V[t] / |V[t]|;  w[t] = <V[t], m> / <m, m>;  Z = V - w m
            c[t,d] = floor(Z / (step * rms(Z[t]))) + 1/2, clamped;  vt[t] = <Z, Z> / <Z, c>
            V_hat[t,d] = c[t,d] * vt[t] + w[t] * m[d]
    exact   the tokens of smallest |V| (attention sinks have it) are kept, key and value, as the tail keeps tokens;
            keys' ranges leave them out, their keys' codes are 0, their kt is -0.0, their vt and w are 0

Codes are made with the rounded scales. vt makes <Z, Z_hat> = <Z, Z>: the MSE-optimal step alone shrinks every value,
and that bias does not average out over the tokens an attention sums (docs/accuracy.md). Steps: J. Max, "Quantizing for
minimum distortion", 1960 (uniform midrise quantizer of a unit Gaussian).
"""

import torch
from torch import Tensor

from kvarn import float8
from kvarn.layout import StoreLayout
from kvarn.packing import pack_keys, pack_values, unpack_keys, unpack_values
from kvarn.words import from_words, to_words

GAUSSIAN_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352}
_TINY = 1e-30


def encode(k: Tensor, v: Tensor, layout: StoreLayout) -> Tensor:
    """Tiles k, v [..., G, D] float32 in the store frame, finite, to records [..., record_bytes] uint8."""
    record = k.new_zeros((*k.shape[:-2], layout.record_bytes), dtype=torch.uint8)
    norm = v.square().sum(-1)
    at = norm.topk(layout.spec.exact_rows, -1, largest=False).indices
    if layout.spec.exact_rows:
        _encode_exact(k, v, at, record, layout)
    _encode_keys(k, at, record, layout)
    _encode_values(v, norm, at, record, layout)
    return record


def decode(record: Tensor, layout: StoreLayout) -> tuple[Tensor, Tensor]:
    """Records [..., record_bytes] back to tiles K_hat, V_hat [..., G, D] float32 in the store frame."""
    spec, f = layout.spec, layout.record
    codes = unpack_keys(f["k_codes"].of(record), spec.k_bits).float()
    k = (codes * key_steps(record, layout)[..., None, :] + f["kz"].of(record).float()[..., None, :])
    k = k * f["kt"].of(record).float()[..., None]
    codes = unpack_values(f["v_codes"].of(record), spec.v_bits).transpose(-1, -2).float()
    vt, w, m = value_scales(record, layout)
    v = (codes - (2**spec.v_bits - 1) / 2) * vt[..., None] + w[..., None] * m[..., None, :]
    if spec.exact_rows:
        at = f["exact_at"].of(record).long()[..., None].expand(*record.shape[:-1], spec.exact_rows, layout.head_dim)
        k, v = (x.scatter(-2, at, row) for x, row in zip((k, v), exact_tokens(record, layout), strict=True))
    return k, v


def key_steps(record: Tensor, layout: StoreLayout) -> Tensor:
    """ks [..., D] float32."""
    return layout.record["ks"].of(record).float()


def value_scales(record: Tensor, layout: StoreLayout) -> tuple[Tensor, Tensor, Tensor]:
    """vt [..., G], w [..., G] and m [..., D], float32; vt and w of exact tokens are zero."""
    f = layout.record
    scalars = f["scalars"].of(record)
    return (f["vt"].of(record).float() * scalars[..., 0:1], f["w"].of(record).float() * scalars[..., 1:2],
            f["m"].of(record).float())


def exact_tokens(record: Tensor, layout: StoreLayout) -> tuple[Tensor, Tensor]:
    """Keys and values [..., E, D] float32 of the exact tokens, which lie at record field exact_at."""
    f = layout.record
    k_scale, v_scale = f["scalars"].of(record)[..., 2:].unflatten(-1, (-1, 2)).unbind(-1)
    return from_words(f["exact"].of(record), k_scale, v_scale, layout.value_bits)


def _encode_exact(k: Tensor, v: Tensor, at: Tensor, record: Tensor, layout: StoreLayout) -> None:
    f, index = layout.record, at[..., None].expand(*at.shape, layout.head_dim)
    words, *scales = to_words(k.gather(-2, index), v.gather(-2, index), layout.value_bits)
    f["exact_at"].of(record).copy_(at)
    f["exact"].of(record).copy_(words)
    f["scalars"].of(record)[..., 2:] = torch.stack(scales, -1).flatten(-2).float()


def _encode_keys(k: Tensor, at: Tensor, record: Tensor, layout: StoreLayout) -> None:
    f, top = layout.record, 2**layout.spec.k_bits - 1
    kt = k.square().mean(-1).sqrt().clamp(max=65504.0).half()
    f["kt"].of(record).copy_(kt.scatter(-1, at, -0.0))
    kt = kt.float()[..., None]
    u = k / torch.where(kt > 0, kt, 1.0)
    exact = torch.zeros_like(kt, dtype=torch.bool).scatter_(-2, at[..., None], True)
    f["kz"].of(record).copy_(u.masked_fill(exact, torch.inf).amin(-2))
    kz = f["kz"].of(record).float()
    step = (u.masked_fill(exact, -torch.inf).amax(-2) - kz).clamp_min(0) / top
    f["ks"].of(record).copy_(float8.upward_half(step))
    ks = key_steps(record, layout)
    codes = ((u - kz[..., None, :]) / ks.clamp_min(_TINY)[..., None, :]).round().clamp(0, top).masked_fill(exact, 0)
    f["k_codes"].of(record).copy_(pack_keys(codes, layout.spec.k_bits))


def _encode_values(v: Tensor, norm: Tensor, at: Tensor, record: Tensor, layout: StoreLayout) -> None:
    f, spec = layout.record, layout.spec
    half = (2**spec.v_bits - 1) / 2
    _set_e4m3(f["m"].of(record), _scaled(_mean_direction(v, norm))[0])
    m = f["m"].of(record).float()
    w = (v @ m[..., None])[..., 0] / m.square().sum(-1, keepdim=True).clamp_min(_TINY)
    w, w_unit = _scaled(w.scatter(-1, at, 0))
    _set_e4m3(f["w"].of(record), w)
    z = v - (f["w"].of(record).float() * w_unit)[..., None] * m[..., None, :]
    codes = (z / _value_step(z, spec.v_bits).clamp_min(_TINY)).floor().add_(0.5).clamp_(-half, half)
    f["v_codes"].of(record).copy_(pack_values(codes + half, spec.v_bits))
    gain = z.square().sum(-1) / (z * codes).sum(-1).clamp_min(_TINY)
    gain, vt_unit = _scaled(gain.scatter(-1, at, 0))
    if spec.v_bits > 2:
        f["vt"].of(record).copy_(gain)
    else:
        _set_e4m3(f["vt"].of(record), gain)
    f["scalars"].of(record)[..., 0:1] = vt_unit
    f["scalars"].of(record)[..., 1:2] = w_unit


def _mean_direction(v: Tensor, norm: Tensor) -> Tensor:
    """Mean over tokens [..., D] of the unit vectors of v [..., G, D]."""
    return (v / norm.sqrt().clamp_min(_TINY)[..., None]).mean(-2)


def _value_step(z: Tensor, bits: int) -> Tensor:
    """Rounding step per token [..., G, 1]: MSE-optimal for a Gaussian up to 4 bits, the whole range at 8."""
    if bits in GAUSSIAN_STEP:
        return z.square().mean(-1, keepdim=True).sqrt() * GAUSSIAN_STEP[bits]
    return z.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] over its unit [..., 1], the unit such that the largest magnitude becomes e4m3's largest value."""
    unit = x.abs().amax(-1, keepdim=True) / float8.MAX
    return x / torch.where(unit > 0, unit, 1.0), unit


def _set_e4m3(view: Tensor, x: Tensor) -> None:
    view.view(torch.uint8).copy_(float8.nearest(x).view(torch.uint8))
