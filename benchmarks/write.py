"""Quantizing long chunks against copy bandwidth, and appending one token against writing it in bf16."""

import torch
from common import copy_bandwidth, milliseconds, show, write_rows

from kvarn.cache import PackedCache
from kvarn.kernels import configs, quantize


def check(dim):
    """The kernels' bytes are the CPU quantizer's, but for rounding ties."""
    gpu = PackedCache.empty("k4v2_g128", 1, 2, 640, dim, torch.bfloat16, "cuda")
    cpu = PackedCache.empty("k4v2_g128", 1, 2, 640, dim, torch.bfloat16)
    k, v = (torch.randn(1, 2, 600, dim, dtype=torch.bfloat16) for _ in range(2))
    cpu.append(k, v, torch.arange(600))
    gpu.append(k.cuda(), v.cuda(), torch.arange(600, device="cuda"))
    share = float((gpu.records.cpu() != cpu.records).double().mean())
    assert share < 2e-3, f"{share} of the bytes differ"
    return share


def chunk(dim, bandwidth, config):
    rows, heads, n = 32, 8, 8192
    cache = PackedCache.empty("k4v2_g128", rows, heads, n + 128, dim, torch.bfloat16, "cuda")
    k, v = (torch.randn(rows, heads, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    at, before = torch.arange(n, device="cuda")[None], torch.empty(rows, dtype=torch.int64, device="cuda")
    offsets = configs.offsets(cache.layout)
    store = cache.tensors()[:3]
    ms = milliseconds(lambda: quantize.close(k, v, at, *store, before, cache.balance, *config, **offsets), 7, 2)
    moved = 4 * k.numel() + cache.records.numel()
    return {"what": "quantize", "head_dim": dim, "warps": config[0], "maxnreg": config[1] or 0, "ms": ms,
            "of_copy": moved / ms / 1e6 / bandwidth, "bf16_write_ms": float("nan"), "bytes_differ": check(dim)}


def token(dim, bandwidth):
    rows, heads = 64, 8
    cache = PackedCache.empty("k4v2_g128", rows, heads, 4096, dim, torch.bfloat16, "cuda")
    k, v = (torch.randn(rows, heads, 1, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    plain = [torch.zeros(rows, heads, 4096, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    at = torch.full((1,), 1001, device="cuda")
    cache.lengths.fill_(1001)
    base = milliseconds(lambda: (plain[0].index_copy_(2, at, k), plain[1].index_copy_(2, at, v)), 15, 32)
    return {"what": "append", "head_dim": dim, "warps": 4, "maxnreg": 0,
            "ms": milliseconds(lambda: cache.append(k, v, at), 15, 32), "of_copy": float("nan"), "bf16_write_ms": base,
            "bytes_differ": check(dim)}


def main():
    bandwidth = copy_bandwidth()
    rows = [chunk(128, bandwidth, config) for config in ((8, None), (8, 128), (16, None))]
    rows += [chunk(64, bandwidth, (4, None)), token(128, bandwidth)]
    for row in rows:
        show(row)
    write_rows("write", rows)


if __name__ == "__main__":
    main()
