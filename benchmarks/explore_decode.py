"""Decode over a grid of launch configurations: where kvarn/kernels/configs.py comes from.

Every variant is first compiled and checked against the float64 reference on a small store, in parallel processes that
fill Triton's cache; then each shape is timed with each variant of its head_dim and several numbers of programs.

    python benchmarks/explore_decode.py [number of a shape in SHAPES ...]
"""

import dataclasses
import itertools
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

import torch
from common import copy_bandwidth, milliseconds, paged_store, random_store, show, write_rows

from kvarn import decode_cuda
from kvarn.kernels import configs
from kvarn.paged_layout import PagedLayout
from kvarn.reference import attention, read_store
from kvarn.spec import PRESETS

SHAPES = [  # batch, KV heads, query heads per KV head, tokens, head_dim, query tokens, paged
    (1, 8, 8, 32768, 128, 1, False), (4, 8, 8, 32768, 128, 1, False), (32, 8, 8, 16384, 128, 1, False),
    (8, 8, 8, 4096, 128, 1, False), (32, 8, 8, 16384, 64, 1, False), (16, 8, 8, 16384, 256, 1, False),
    (32, 8, 1, 16384, 128, 1, False), (32, 8, 4, 16384, 128, 1, False), (32, 8, 5, 16384, 128, 1, False),
    (4, 8, 8, 32768, 128, 1, True), (32, 8, 8, 16384, 128, 1, True), (32, 8, 4, 16384, 128, 4, True),
    (1, 8, 8, 32768, 128, 1, True), (4, 8, 4, 32768, 128, 8, True),
]
WAVES = (0.67, 1, 2)


def variants(dim: int, queries: int) -> list[configs.DecodeConfig]:
    """The default, and what differs from it in one respect or two; `splits` is set later."""
    base = configs.decode(32, 8, 128, queries, PagedLayout(PRESETS["k4v2_g128"], dim, torch.bfloat16), 132)
    others = [{}, {"maxnreg": None}, {"maxnreg": 200}, {"maxnreg": 168}, {"num_stages": 2}, {"num_stages": 3},
              {"step": 64}, {"step": 64, "num_warps": 1, "num_stages": 2, "maxnreg": None},
              {"block": 8, "maxnreg": 168}, {"step": 128, "num_warps": 2, "maxnreg": None}]
    return list(dict.fromkeys(dataclasses.replace(base, **other) for other in others))


def check(case: tuple) -> float:
    """Relative error of one variant for (dim, group, n, paged) on a small store; compiles it on the way."""
    (dim, group, n, paged), variant = case
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    run, store, q = prepared((2, 2, group, 2000, dim, n, paged))
    configs.decode = lambda *_: dataclasses.replace(variant, splits=3)
    out = run().double()
    out = out.view(2, n, -1, dim).transpose(1, 2) if paged else out
    k, v = (x[:, :, :2000] for x in read_store(*store.tensors(), store.layout))
    mask = torch.arange(2000, device="cuda") <= torch.arange(2000 - n, 2000, device="cuda")[:, None]
    reference = attention(q, k, v, mask)
    return float((out - reference).norm() / reference.norm())


def prepared(shape: tuple):
    """A store of one shape, its query [B, Hq, n, D], and the call that one decode step makes of it."""
    batch, heads, group, tokens, dim, n, paged = shape
    store = random_store("k4v2_g128", batch, heads, tokens, dim)
    q = torch.randn(batch, heads * group, n, dim, device="cuda", dtype=torch.bfloat16)
    balance = store.tensors()[3]
    if not paged:
        out = torch.empty_like(q)
        return (lambda: decode_cuda.decode_store(q, *store.tensors(), None, tokens, dim**-0.5, store.layout, out),
                store, q)
    cache, table, layout = paged_store(store, tokens)
    starts = torch.arange(0, n * batch + 1, n, device="cuda").int()
    ends = torch.full((batch,), tokens, device="cuda").int()
    flat = q.transpose(1, 2).reshape(batch * n, heads * group, dim).contiguous()
    out = torch.empty_like(flat)
    return (lambda: decode_cuda.decode_paged(flat, cache, table, starts, ends, balance, n, tokens, dim**-0.5, layout,
                                             out), store, q)


def kernels(run) -> str:
    """Time of each kernel of one call, launched one by one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    ours = (e for e in profile.key_averages() if e.key.endswith(("_tiles", "_parts")))
    return "  ".join(f"{e.key} {e.device_time:.1f} us" for e in ours)


def main(*chosen: str):
    shapes = [SHAPES[int(i)] for i in chosen] or SHAPES
    kinds = {(dim, group * n, paged): (dim, group, n, paged) for _, _, group, _, dim, n, paged in shapes}
    cases = [(kind, variant) for (dim, queries, _), kind in kinds.items() for variant in variants(dim, queries)]
    with ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
        errors = list(pool.map(check, cases))
    for (kind, variant), error in zip(cases, errors, strict=True):
        if not error < 5e-3:
            print("WRONG", kind, variant, error, flush=True)
    right = {(kind, variant) for (kind, variant), error in zip(cases, errors, strict=True) if error < 5e-3}
    print("checked", len(cases), "variants; largest error", max(errors), flush=True)
    default, bandwidth, rows = configs.decode, copy_bandwidth(), []
    print(torch.cuda.get_device_name(), "copy GB/s", bandwidth, flush=True)
    for shape in shapes:
        batch, heads, group, tokens, dim, n, paged = shape
        run, store, _ = prepared(shape)
        plain, found, seen = batch * heads * tokens * dim * 4 / bandwidth / 1e6, [], set()
        kind = kinds[dim, group * n, paged]
        configs.decode = default
        ms = milliseconds(run)
        print(shape, "default", f"{ms:.4f} ms = {plain / ms:.2f}x", kernels(run), flush=True)
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        mine = [v for v in variants(dim, group * n) if (kind, v) in right]
        for variant, waves in itertools.product(mine, WAVES):
            registers = variant.maxnreg or 255
            resident = processors * (65536 // (-(-registers // 8) * 8 * 32 * variant.num_warps))
            splits = max(1, int(waves * resident) // (batch * heads * -(-group * n // variant.block)))
            config = dataclasses.replace(variant, splits=splits)
            if splits > tokens // 128 or config in seen:
                continue
            seen.add(config)
            configs.decode = lambda *_, config=config: config
            ms = milliseconds(run, 7)
            found.append({"batch": batch, "heads": heads, "group": group, "tokens": tokens, "dim": dim, "n": n,
                          "paged": int(paged), "waves": waves, "ms": ms, "times_faster": plain / ms,
                          "packed_gb_s": store.records.numel() / ms / 1e6, "copy_gb_s": bandwidth,
                          **dataclasses.asdict(config), "maxnreg": variant.maxnreg or 0})
        rows += found
        for row in sorted(found, key=lambda r: r["ms"])[:8]:
            show({k: x for k, x in row.items() if k not in ("heads", "copy_gb_s")})
        del run, store
    write_rows("explore_decode", rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(*sys.argv[1:]))
