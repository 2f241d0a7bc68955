"""Float64 references, written for reading: what every implementation is tested against. Never imports kernels."""

import torch
from torch import Tensor

from kvarn.hadamard import hadamard
from kvarn.layout import StoreLayout
from kvarn.quantize import decode, read_tail


def read_store(records: Tensor, tail: Tensor, lengths: Tensor, balance: Tensor, layout: StoreLayout
               ) -> tuple[Tensor, Tensor]:
    """Everything a store holds, in the plain frame: K, V [B, H, T * G, D] float64."""
    k, v = (x.clone() for x in decode(records, layout))
    if layout.spec.sink:
        k[:, :, 0], v[:, :, 0] = layout.tail["sink_k"].of(tail), layout.tail["sink_v"].of(tail)
    tail_k, tail_v = read_tail(tail, layout)
    for row, length in enumerate(lengths.tolist()):
        opened = max(length - 1, 0) // layout.spec.group
        k[row, :, opened], v[row, :, opened] = tail_k[row].to(k.dtype), tail_v[row].to(v.dtype)
    if not layout.spec.rotated:
        return k.flatten(2, 3).double(), v.flatten(2, 3).double()
    k, v = k.flatten(2, 3).double(), v.flatten(2, 3).double()
    h = hadamard(layout.head_dim, k.device, torch.float64)
    return k @ h / balance.double()[:, None], v @ h


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False,
              scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale + mask) v in float64, GQA by head index; a query that sees nothing gives zeros.

    q [B, Hq, n, D], k and v [B, H, S, D], mask bool or additive, broadcastable to [B, Hq, n, S].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.nan_to_num(scores.softmax(-1), nan=0.0) @ v
