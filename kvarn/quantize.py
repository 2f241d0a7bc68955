"""Tiles to records and back, for every method; tokens to the tail and back. All in the store frame."""

import torch
from torch import Tensor

from kvarn import closed, upstream
from kvarn.layout import StoreLayout

_METHODS = {"kvarn": closed, "upstream": upstream}


def encode(k: Tensor, v: Tensor, layout: StoreLayout) -> Tensor:
    """Tiles k, v [..., G, D] in the store frame (frame.py) to records [..., record_bytes] uint8.

    A NaN is stored as zero and an infinity as the largest float16, so that neither reaches the tile's other tokens;
    method "raw" keeps the bits.
    """
    if layout.spec.method == "raw":
        record = torch.empty((*k.shape[:-2], layout.record_bytes), dtype=torch.uint8, device=k.device)
        layout.record["k"].of(record).copy_(k)
        layout.record["v"].of(record).copy_(v)
        return record
    return _METHODS[layout.spec.method].encode(finite(k), finite(v), layout)


def decode(record: Tensor, layout: StoreLayout) -> tuple[Tensor, Tensor]:
    """Records [..., record_bytes] to tiles k, v [..., G, D]: float32; method "raw": views in the cache dtype."""
    if layout.spec.method == "raw":
        return layout.record["k"].of(record), layout.record["v"].of(record)
    return _METHODS[layout.spec.method].decode(record, layout)


def write_tail(tail: Tensor, layout: StoreLayout, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store tokens in the tail. tail [B, H, tail_bytes]; rows, slots int64 [N]; k, v [N, H, D] in the store frame."""
    f = layout.tail
    for name, x in (("k", k), ("v", v)):
        if layout.spec.tail_bits == 8:
            x = finite(x)
            scale = (x.abs().amax(-1) / 127).clamp(max=65504.0).half()
            codes = x / scale.float().clamp_min(1e-8)[..., None]
            f[name].of(tail)[rows, :, slots] = codes.round().clamp(-127, 127).to(torch.int8)
            f[f"{name}_scale"].of(tail)[rows, :, slots] = scale
        else:
            f[name].of(tail)[rows, :, slots] = x.to(layout.dtype)


def read_tail(tail: Tensor, layout: StoreLayout) -> tuple[Tensor, Tensor]:
    """The tail's tokens k, v [B, H, G, D]: float32, or with tail_bits 16 views of the cache's dtype."""
    f = layout.tail
    k, v = f["k"].of(tail), f["v"].of(tail)
    if layout.spec.tail_bits == 16:
        return k, v
    return (k.float() * f["k_scale"].of(tail).float()[..., None], v.float() * f["v_scale"].of(tail).float()[..., None])


def finite(x: Tensor) -> Tensor:
    """x in float32 with NaN as zero and magnitudes up to float16's largest value."""
    return torch.nan_to_num(x.float(), nan=0.0, posinf=65504.0, neginf=-65504.0).clamp(-65504.0, 65504.0)
