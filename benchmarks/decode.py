"""Decode attention over a packed store, against reading its tokens in bf16 at copy bandwidth, and against SDPA."""

import torch
from common import copy_bandwidth, milliseconds, random_store, show, write_rows

from kvarn.reference import attention, read_store

SHAPES = [  # batch, KV heads, query heads per KV head, tokens, head_dim
    (32, 8, 8, 16384, 128), (4, 8, 8, 32768, 128), (1, 8, 8, 32768, 128), (128, 4, 8, 4096, 128),
    (32, 8, 1, 16384, 128), (32, 8, 4, 16384, 128), (32, 8, 5, 16384, 128), (32, 8, 8, 16384, 64),
    (16, 8, 8, 16384, 256),
]
GROWTH = [(8, 8, 8, tokens, 128) for tokens in (4096, 8192, 16384, 32768, 65536, 131072, 262144)]


def step(batch, heads, group, tokens, dim):
    """A store and the call that one decode step makes of it."""
    cache = random_store("k4v2_g128", batch, heads, tokens, dim)
    q = torch.randn(batch, heads * group, 1, dim, device="cuda", dtype=torch.bfloat16)
    own = torch.zeros(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    at = torch.tensor([tokens - 1], device="cuda")
    return cache, q, lambda: cache.attend(q, own, own, at, None, tokens)


def check(group, dim):
    cache, q, run = step(2, 2, group, 2000, dim)
    k, v = (x[:, :, :2000] for x in read_store(*cache.tensors(), cache.layout))
    reference = attention(q, k, v)
    error = float((run().double() - reference).norm() / reference.norm())
    assert error < 1e-2, f"group {group}, head_dim {dim}: relative error {error}"
    return error


def sdpa(batch, heads, group, tokens, dim):
    """Time of PyTorch's attention on a bf16 cache, or nan where its memory does not fit."""
    if batch * heads * tokens * dim * 4 > 20e9:
        return float("nan")
    q = torch.randn(batch, heads * group, 1, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, heads, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return milliseconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), 7)


def main():
    bandwidth = copy_bandwidth()
    print(torch.cuda.get_device_name(), f"copy {bandwidth:.0f} GB/s", flush=True)
    for name, shapes in (("decode", SHAPES), ("growth", GROWTH)):
        rows = []
        for shape in shapes:
            batch, heads, group, tokens, dim = shape
            error = check(group, dim) if name == "decode" else 0.0
            cache, _, run = step(*shape)
            ms = milliseconds(run)
            plain = batch * heads * tokens * dim * 4 / bandwidth / 1e6
            row = {"batch": batch, "kv_heads": heads, "group": group, "tokens": tokens, "head_dim": dim, "ms": ms,
                   "packed_gb_s": cache.records.numel() / ms / 1e6, "copy_gb_s": bandwidth, "bf16_read_ms": plain,
                   "times_faster": plain / ms, "sdpa_ms": sdpa(*shape) if name == "decode" else float("nan"),
                   "error": error}
            rows.append(row)
            show(row)
            del cache, run
        write_rows(name, rows)


if __name__ == "__main__":
    main()
