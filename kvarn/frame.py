"""Into the store frame and out of it: K * balance rotated, V rotated, the query so that every score stays what it was.

    q' k'^T = (q / s) H ((k s) H)^T = q k^T        softmax(.) V H H = softmax(.) V          (H = H^T = H^-1)

Method "raw" has the identity as its frame.
"""

import torch
from torch import Tensor

from kvarn.hadamard import rotate
from kvarn.layout import StoreLayout


def keys_in(k: Tensor, balance: Tensor, layout: StoreLayout) -> Tensor:
    """k [B, H, n, D] plain to the store frame, float32; balance [H, D]."""
    return rotate(k.float() * balance[:, None]) if layout.spec.rotated else k


def values_in(v: Tensor, layout: StoreLayout) -> Tensor:
    """v [B, H, n, D] plain to the store frame, float32."""
    return rotate(v.float()) if layout.spec.rotated else v


def queries_in(q: Tensor, balance: Tensor, layout: StoreLayout) -> Tensor:
    """q [B, Hq, n, D] plain to the frame in which stored keys are read, float32; balance [H, D]."""
    if not layout.spec.rotated:
        return q
    heads = balance.shape[0]
    return rotate((q.float().unflatten(1, (heads, -1)) / balance[:, None, None]).flatten(1, 2))


def keys_out(k: Tensor, balance: Tensor, layout: StoreLayout) -> Tensor:
    """Stored keys [B, H, n, D] back to the plain frame, in the cache's dtype."""
    return (rotate(k.float()) / balance[:, None]).to(layout.dtype) if layout.spec.rotated else k


def values_out(v: Tensor, layout: StoreLayout) -> Tensor:
    """Stored values, or attention outputs over them, [..., D] back to the plain frame, float32."""
    return rotate(v.float()) if layout.spec.rotated else v


def unit_balance(heads: int, head_dim: int, device: torch.device | str) -> Tensor:
    """The balance that changes nothing: ones [H, D] float32."""
    return torch.ones(heads, head_dim, device=device)
