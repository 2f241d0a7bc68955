"""A chunk's attention over a grid of launch configurations, and the time to look at a mask: for kernels/configs.py.

Every variant is first compiled and checked in parallel processes that fill Triton's cache, then timed on a chunk of 8k
tokens over 24k, plain keys and values. A decode step's look at a mask of 32k keys follows.

    python benchmarks/explore_prefill.py
"""

import dataclasses
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

import torch
from common import milliseconds, show, write_rows

from kvarn import cuda
from kvarn.kernels import configs, extent
from kvarn.reference import attention

VARIANTS = {  # head_dim: queries, keys, keys at a time under a mask, warps, stages, turns
    128: [(128, 128, 32, 8, 3, False), (128, 128, 32, 8, 3, True), (128, 128, 32, 8, 2, True),
          (128, 64, 32, 8, 3, False), (128, 64, 32, 8, 4, True), (64, 128, 16, 4, 2, False), (64, 64, 16, 4, 2, False),
          (64, 64, 16, 4, 3, False), (256, 64, 16, 16, 3, False)],
    64: [(128, 128, 32, 8, 3, False), (128, 128, 32, 8, 3, True), (128, 64, 32, 8, 4, True),
         (256, 64, 16, 8, 3, False)],
    256: [(128, 64, 16, 8, 2, False), (128, 64, 16, 8, 2, True), (128, 32, 16, 8, 3, False),
          (64, 64, 16, 8, 2, False)],
}


def attend(q, key, value, mask, out):
    return cuda._masked(q, key, value, mask.expand(*q.shape[:3], key.shape[2]), q.shape[-1] ** -0.5, out)


def inputs(dim: int, n: int, total: int, heads: int, group: int):
    """q, key, value, a causal mask and room for the result."""
    q, key, value = (torch.randn(1, h, tokens, dim, device="cuda", dtype=torch.bfloat16)
                     for h, tokens in ((heads * group, n), (heads, total), (heads, total)))
    mask = torch.arange(total, device="cuda") <= torch.arange(total - n, total, device="cuda")[:, None]
    return q, key, value, mask[None, None], torch.empty_like(q)


def check(case: tuple) -> float:
    """Relative error of one variant on a small chunk; compiles it on the way."""
    dim, variant = case
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    configs.prefill = lambda *_: configs.PrefillConfig(*variant)
    worst = 0.0
    for n, total in ((300, 1000), (256, 1024)):
        tensors = inputs(dim, n, total, 2, 4)
        reference = attention(*tensors[:4])
        worst = max(worst, float((attend(*tensors).double() - reference).norm() / reference.norm()))
    return worst


def look(n: int, dtype: torch.dtype, odd: int = 0) -> dict:
    """A decode step's look at a mask that its heads share."""
    mask = torch.arange(32768 + odd, device="cuda") < 30000 + torch.arange(n, device="cuda")[:, None]
    mask = mask.view(torch.uint8) if dtype == torch.bool else torch.zeros(mask.shape, dtype=dtype,
                                                                          device="cuda").masked_fill(~mask, -torch.inf)
    out = torch.empty(1, 8, 4, dtype=torch.int32, device="cuda")
    mask = mask.expand(1, 64, *mask.shape)
    return {"look": str(dtype), "n": n, "keys": mask.shape[3],
            "us": 1e3 * milliseconds(lambda: extent.extent(mask, out), 15, 16)}


def main():
    cases = [(dim, variant) for dim, some in VARIANTS.items() for variant in some]
    with ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
        errors = dict(zip(cases, pool.map(check, cases), strict=True))
    print(torch.cuda.get_device_name(), "checked", len(cases), "variants", flush=True)
    rows = []
    for dim, some in VARIANTS.items():
        heads, group = (8, 8) if dim < 256 else (8, 4)
        q, key, value, mask, out = inputs(dim, 8192, 32768, heads, group)
        for variant in some:
            if not errors[dim, variant] < 1e-2:
                print("WRONG", dim, variant, errors[dim, variant], flush=True)
                continue
            configs.prefill = lambda *_, variant=variant: configs.PrefillConfig(*variant)
            ms = milliseconds(lambda: attend(q, key, value, mask, out), 3, 1)  # noqa: B023
            seen = 8192 * (24576 + 4096)
            config = dataclasses.asdict(configs.PrefillConfig(*variant))
            rows.append({"head_dim": dim, "kv_heads": heads, "group": group, **config, "ms": ms,
                         "tflops": 4 * seen * dim * heads * group / ms / 1e9, "error": errors[dim, variant]})
            show(rows[-1])
    write_rows("explore_prefill", rows)
    for n, dtype, odd in ((1, torch.bool, 0), (4, torch.bool, 0), (8, torch.bool, 0), (1, torch.bool, 1),
                          (1, torch.bfloat16, 0), (8, torch.bfloat16, 0), (1, torch.float32, 0)):
        show(look(n, dtype, odd))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
