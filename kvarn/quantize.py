"""Tiles to records and back, for every method; tokens to the tail and back. All in the store frame."""

import torch
from torch import Tensor

from kvarn import closed, upstream
from kvarn.layout import StoreLayout
from kvarn.words import from_words, to_words

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
    if layout.spec.tail_bits == 8:
        names, parts = ("words", "k_scale", "v_scale"), to_words(finite(k), finite(v), layout.value_bits)
    else:
        names, parts = ("k", "v"), (k.to(layout.dtype), v.to(layout.dtype))
    for name, part in zip(names, parts, strict=True):
        layout.tail[name].of(tail)[rows, :, slots] = part


def read_tail(tail: Tensor, layout: StoreLayout) -> tuple[Tensor, Tensor]:
    """The tail's tokens k, v [B, H, G, D]: float32, or with tail_bits 16 views of the cache's dtype."""
    f = layout.tail
    if layout.spec.tail_bits == 16:
        return f["k"].of(tail), f["v"].of(tail)
    return from_words(f["words"].of(tail), f["k_scale"].of(tail), f["v_scale"].of(tail), layout.value_bits)


def finite(x: Tensor) -> Tensor:
    """x in float32 with NaN as zero and magnitudes up to float16's largest value."""
    return torch.nan_to_num(x.float(), nan=0.0, posinf=65504.0, neginf=-65504.0).clamp(-65504.0, 65504.0)
