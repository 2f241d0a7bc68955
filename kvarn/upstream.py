"""The record of method "upstream": arXiv 2606.03458 to the letter, for comparison. K [G, D] and V [G, D] of one tile.

    normalize   alternate column and row standard deviations in the log domain, L <- clamp(L + log std, -0.3, 10), std
                clamped to [1e-3, 1e3]; keep the scales of lowest max/min(col std) + max/min(row std) over 8 iterations
    round       asymmetric to nearest, K per channel over tokens, V per token over channels
    fold        K_hat[t,d] = (q * ks[d] + kz[d]) * kt[t];  V_hat[t,d] = (q * vt[t] + vz[t]) * vs[d]
"""

import torch
from torch import Tensor

from kvarn.layout import StoreLayout
from kvarn.packing import pack_keys, pack_values, unpack_keys, unpack_values

ITERATIONS = 8
_LOG_RANGE = (-0.3, 10.0)
_STD_RANGE = (1e-3, 1e3)


def encode(k: Tensor, v: Tensor, layout: StoreLayout) -> Tensor:
    """Tiles k, v [..., G, D] float32 in the store frame, finite, to records [..., record_bytes] uint8."""
    f, spec = layout.record, layout.spec
    record = k.new_zeros((*k.shape[:-2], layout.record_bytes), dtype=torch.uint8)
    rows, columns = normalize(k)
    codes, step, low = _round(k / rows / columns, -2, spec.k_bits)
    f["k_codes"].of(record).copy_(pack_keys(codes, spec.k_bits))
    f["ks"].of(record).copy_((step * columns)[..., 0, :])
    f["kz"].of(record).copy_((low * columns)[..., 0, :])
    f["kt"].of(record).copy_(rows[..., 0])
    rows, columns = normalize(v)
    codes, step, low = _round(v / rows / columns, -1, spec.v_bits)
    f["v_codes"].of(record).copy_(pack_values(codes, spec.v_bits))
    f["vt"].of(record).copy_((step * rows)[..., 0])
    f["vz"].of(record).copy_((low * rows)[..., 0])
    f["vs"].of(record).copy_(columns[..., 0, :])
    return record


def decode(record: Tensor, layout: StoreLayout) -> tuple[Tensor, Tensor]:
    """Records [..., record_bytes] back to tiles K_hat, V_hat [..., G, D] float32 in the store frame."""
    spec, f = layout.spec, layout.record
    get = {name: f[name].of(record).float() for name in ("ks", "kz", "kt", "vt", "vz", "vs")}
    codes = unpack_keys(f["k_codes"].of(record), spec.k_bits).float()
    k = (codes * get["ks"][..., None, :] + get["kz"][..., None, :]) * get["kt"][..., None]
    codes = unpack_values(f["v_codes"].of(record), spec.v_bits).transpose(-1, -2).float()
    v = (codes * get["vt"][..., None] + get["vz"][..., None]) * get["vs"][..., None, :]
    return k, v


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row scales [..., G, 1] and column scales [..., 1, D] of tiles x [..., G, D], after ITERATIONS alternations."""
    log_rows, log_columns = torch.zeros_like(x[..., :1]), torch.zeros_like(x[..., :1, :])
    best_rows, best_columns, best = log_rows, log_columns, torch.full_like(x[..., :1, :1], torch.inf)
    for _ in range(ITERATIONS):
        y = x / log_rows.exp() / log_columns.exp()
        log_columns = (log_columns + _log_std(y, -2)).clamp(*_LOG_RANGE)
        y = x / log_rows.exp() / log_columns.exp()
        log_rows = (log_rows + _log_std(y, -1)).clamp(*_LOG_RANGE)
        y = x / log_rows.exp() / log_columns.exp()
        imbalance = _ratio(y.std(-2, keepdim=True)) + _ratio(y.std(-1, keepdim=True))
        better = imbalance < best
        best = torch.where(better, imbalance, best)
        best_rows = torch.where(better, log_rows, best_rows)
        best_columns = torch.where(better, log_columns, best_columns)
    return best_rows.exp(), best_columns.exp()


def _log_std(x: Tensor, dim: int) -> Tensor:
    return x.std(dim, keepdim=True).clamp(*_STD_RANGE).log()


def _ratio(std: Tensor) -> Tensor:
    std = std.clamp(*_STD_RANGE)
    return std.amax((-1, -2), keepdim=True) / std.amin((-1, -2), keepdim=True)


def _round(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric rounding to nearest of x over `dim`: codes, step and lowest value."""
    low, top = x.amin(dim, keepdim=True), 2**bits - 1
    step = (x.amax(dim, keepdim=True) - low) / top
    codes = ((x - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, top)
    return codes, step, low
