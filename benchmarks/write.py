"""Quantizing long chunks against copy bandwidth, and appending one token against writing it in bf16."""

import torch
from common import copy_bandwidth, milliseconds, show, write_rows

from kvarn.cache import PackedCache
from kvarn.device import assembly, capability
from kvarn.kernels import configs, quantize
from kvarn.paged_cuda import append_paged_cuda
from kvarn.paged_layout import paged_layout
from kvarn.spec import PRESETS

CAPABILITY = capability(torch.device("cuda"))


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


def chunk(dim, bandwidth):
    """8k tokens of 8 heads and 32 rows (or layers), by the configuration of configs.fill."""
    rows, heads, n = 32, 8, 8192
    cache = PackedCache.empty("k4v2_g128", rows, heads, n + 128, dim, torch.bfloat16, "cuda")
    k, v = (torch.randn(rows, heads, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    at, before = torch.arange(n, device="cuda")[None], torch.empty(rows, dtype=torch.int64, device="cuda")
    store, offsets, config = cache.tensors()[:3], configs.offsets(cache.layout), configs.fill(dim, 128, CAPABILITY)
    how = 1, configs.leave(dim, 128, CAPABILITY), *config, assembly(k.device)
    ms = milliseconds(lambda: quantize.close(k, v, at, *store, before, cache.balance, *how, **offsets), 7, 2)
    moved = 4 * k.numel() + cache.records.numel()
    return {"what": "quantize", "head_dim": dim, "warps": config[0], "maxnreg": config[1] or 0, "ms": ms,
            "of_copy": moved / ms / 1e6 / bandwidth, "bf16_write_ms": float("nan"), "bytes_differ": check(dim)}


def token(dim, rows=64, heads=8):
    """One token of each row, which fills no tile, into a contiguous store."""
    cache = PackedCache.empty("k4v2_g128", rows, heads, 4096, dim, torch.bfloat16, "cuda")
    k, v = (torch.randn(rows, heads, 1, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    plain = [torch.zeros(rows, heads, 4096, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    at = torch.full((1,), 1001, device="cuda")
    cache.lengths.fill_(1001)
    base = milliseconds(lambda: (plain[0].index_copy_(2, at, k), plain[1].index_copy_(2, at, v)), 15, 32)
    return {"what": "append", "head_dim": dim, "warps": 4, "maxnreg": 0,
            "ms": milliseconds(lambda: cache.append(k, v, at), 15, 32), "of_copy": float("nan"), "bf16_write_ms": base,
            "bytes_differ": check(dim)}


def paged_token(dim, rows=64, heads=8, length=1002):
    """The same into a paged store; some rows' tiles become full where `length` is a multiple of 128."""
    layout = paged_layout(PRESETS["k4v2_g128"].key, dim, torch.bfloat16)
    blocks = layout.blocks(length)
    cache = torch.zeros(rows * blocks, heads, layout.record_bytes, dtype=torch.uint8, device="cuda")
    table = torch.randperm(rows * blocks, device="cuda").int().view(rows, blocks)
    k, v = torch.randn(rows, 2, heads, dim, device="cuda", dtype=torch.bfloat16).unbind(1)
    starts, ends = torch.arange(rows + 1, device="cuda").int(), torch.full((rows,), length, device="cuda").int()
    where = table, starts, ends, torch.ones(heads, dim, device="cuda"), layout.spec.key
    plain = [torch.zeros(rows * blocks, 128, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    at = table[:, length // 128].long(), torch.full((rows,), length % 128, device="cuda")
    base = milliseconds(lambda: (plain[0].index_put_(at, k), plain[1].index_put_(at, v)), 15, 32)
    ms = milliseconds(lambda: append_paged_cuda(k, v, cache, *where), 15, 32)
    return {"what": "append_paged" if length % 128 else "append_paged_full", "head_dim": dim,
            "warps": configs.leave(dim, 128, CAPABILITY), "maxnreg": 0, "ms": ms, "of_copy": float("nan"),
            "bf16_write_ms": base, "bytes_differ": float("nan")}


def main():
    bandwidth = copy_bandwidth()
    rows = [*(chunk(dim, bandwidth) for dim in (64, 128, 256)), token(128), paged_token(128),
            paged_token(128, length=1024)]
    for row in rows:
        show(row)
    write_rows("write", rows)


if __name__ == "__main__":
    main()
