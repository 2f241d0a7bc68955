"""Decode over a grid of launch configurations: where kvarn/kernels/configs.py comes from."""

import itertools
import sys
import warnings
from functools import partial

import torch
from common import copy_bandwidth, milliseconds, random_store, show, write_rows

from kvarn.kernels import configs
from kvarn.reference import attention, read_store

SHAPES = [(32, 8, 8, 16384, 128), (4, 8, 8, 16384, 128), (1, 8, 8, 32768, 128)]


def check(dim=128):
    cache = random_store("k4v2_g128", 2, 2, 1000, dim, torch.float16)
    q = torch.randn(2, 16, 1, dim, device="cuda", dtype=torch.float16)
    own = torch.zeros(2, 2, 1, dim, device="cuda", dtype=torch.float16)
    out = cache.attend(q, own, own, torch.tensor([999], device="cuda"), None, 1000)
    k, v = (x[:, :, :1000].cpu() for x in read_store(*cache.tensors(), cache.layout))
    reference = attention(q.cpu(), k, v)
    error = float((out.cpu().double() - reference).norm() / reference.norm())
    print("check", configs.decode.__name__, error, flush=True)
    assert error < 5e-3


def main():
    grid = [(2, 128, 3, None), (2, 128, 2, None), (2, 128, 3, 168), (2, 128, 3, 128), (1, 64, 3, None), (1, 64, 3, 168),
            (1, 64, 3, 128), (4, 128, 3, None), (4, 128, 3, 128), (2, 64, 3, None), (2, 64, 3, 128), (2, 128, 4, 168)]
    bandwidth, rows = copy_bandwidth(), []
    print(torch.cuda.get_device_name(), "copy GB/s", bandwidth, flush=True)
    for batch, heads, group, tokens, dim in SHAPES:
        cache = random_store("k4v2_g128", batch, heads, tokens, dim)
        q = torch.randn(batch, heads * group, 1, dim, device="cuda", dtype=torch.bfloat16)
        own = torch.zeros(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
        at = torch.tensor([tokens - 1], device="cuda")
        plain = batch * heads * tokens * dim * 4 / bandwidth / 1e6
        found = []
        for (warps, step, stages, cap), factor in itertools.product(grid, (0.5, 1, 2)):
            splits = max(1, int(132 * 8 * factor) // (batch * heads))
            if splits > tokens // 128:
                continue
            config = configs.DecodeConfig(splits, step, warps, stages, cap)
            configs.decode = lambda *_, config=config: config
            try:
                check(dim)
                ms = milliseconds(partial(cache.attend, q, own, own, at, None, tokens))
            except (RuntimeError, AssertionError) as problem:
                print(config, "failed:", str(problem)[:100], flush=True)
                continue
            row = {"batch": batch, "heads": heads, "group": group, "tokens": tokens, "dim": dim, "splits": splits,
                   "step": step, "warps": warps, "stages": stages, "maxnreg": cap or 0, "ms": ms,
                   "packed_gb_s": cache.records.numel() / ms / 1e6, "of_bf16_read": plain / ms, "copy_gb_s": bandwidth}
            found.append(row)
        rows += found
        for row in sorted(found, key=lambda r: r["ms"])[:6]:
            show(row)
    write_rows("explore_decode", rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
