"""Decode speed of a whole model: backend="kvarn" against backend="inductor", transformers' StaticCache, one card.

    python benchmarks/end_to_end.py [--layers 28] [--capacity 32768] [--tokens 31000] [--budget 160]
    python benchmarks/end_to_end.py --tiny --device cpu          (a rehearsal without a GPU; writes no row)

The model has qwen2.5-coder-1.5b's shape and random weights. It is timed at batch 1 and at the largest batch whose cache
fits beside the model for each backend, both under mode="reduce-overhead" (CUDA graphs). Nothing is prefilled: a step's
time depends on how many tokens a cache holds, not on which, so random content and the right lengths are put in place.
First it checks, on a short prompt, that the lossless preset gives the plain model's tokens and the default preset the
logits of the CPU implementation. Rows go to results/end_to_end.csv; what --budget seconds do not suffice for is named,
not run.
"""

import argparse
import gc
import statistics
import time

import torch
from common import show, write_rows
from torch._dynamo.utils import counters
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers import logging as transformers_logging

from kvarn.cache import PackedCache
from kvarn.layout import StoreLayout
from kvarn.spec import DEFAULT_PRESET, resolve
from kvarn_compile import hf
from kvarn_compile.binding import binding_of
from kvarn_compile.hf_models import CACHE_ARGUMENT, cache_bytes

RESERVE = 5 << 30
"""Bytes left for the compiler's buffers, CUDA graphs' pools and fragments when the largest batch is computed."""
LOGITS_ERROR = 0.03
"""Largest relative difference of logits that passes between the GPU's kernels and the CPU implementation: both round to
the same codes. (From the plain model's logits 2-bit codes of random values are an order of magnitude further away.)"""
CHECKED = {"layers": 2, "capacity": 512}


def shape(args):
    small = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    large = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
    return Qwen2Config(**(small if args.tiny else large), num_key_value_heads=2, num_hidden_layers=args.layers,
                       max_position_embeddings=args.capacity, tie_word_embeddings=True)


def make(config, args, dtype):
    torch.manual_seed(0)
    with torch.device(args.device):
        model = Qwen2ForCausalLM(config).to(dtype).eval()
    for layer in model.model.layers:  # biases are zero at first; the real model's keys have large ones
        layer.self_attn.k_proj.bias.data.normal_()
    return model


def logits_of(call, cache, pieces):
    """Last logits [steps, vocabulary] after each piece of ids [1, n]."""
    with torch.no_grad():
        return torch.cat([call(piece, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1] for piece in pieces])


def packed_logits(model, preset, pieces):
    """logits_of a compiled model, on whichever device it is, every layer of which must have been packed."""
    torch._dynamo.reset()
    cache = hf.empty_static_cache(model.config, 1, CHECKED["capacity"], model.dtype, model.device)
    call = torch.compile(model, backend="kvarn", options={"preset": preset, "inner": "eager"})
    logits = logits_of(call, cache, [piece.to(model.device) for piece in pieces])
    assert all(binding_of(layer.keys) for layer in cache.layers), "a layer was not packed"
    return logits.cpu()


def distance(a, b):
    return float((a - b).norm() / b.norm())


def check(args):
    """Raises unless two layers of the model give the plain tokens (lossless) and the CPU's logits (default preset)."""
    config = shape(argparse.Namespace(**{**vars(args), **CHECKED}))
    config.vocab_size = min(config.vocab_size, 4096)
    model = make(config, args, torch.float32)
    plain = StaticCache(config=config, max_cache_len=CHECKED["capacity"])
    ids = [torch.randint(1, config.vocab_size, (1, 300), device=args.device)]
    for _ in range(8):
        ids.append(logits_of(model, plain, ids[-1:]).argmax(-1, keepdim=True))
    plain.reset()
    expected = logits_of(model, plain, ids).cpu()
    lossless, packed = (packed_logits(model, preset, ids) for preset in ("k16v16", DEFAULT_PRESET))
    reference = packed_logits(model.cpu(), DEFAULT_PRESET, ids)
    assert torch.equal(lossless.argmax(-1), expected.argmax(-1)), "the lossless preset gives other tokens"
    print(f"relative differences of logits: k16v16 from plain {distance(lossless, expected):.2g}; {DEFAULT_PRESET} "
          f"from the CPU implementation {distance(packed, reference):.2g}, from plain {distance(packed, expected):.2g}",
          flush=True)
    assert distance(packed, reference) < LOGITS_ERROR, "the kernels' logits are not the CPU implementation's"


def bytes_a_row(backend, config, capacity, dtype):
    """Bytes one more row takes: its cache in all layers, and what a step needs for it."""
    heads, queries, layers = config.num_key_value_heads, config.num_attention_heads, config.num_hidden_layers
    dim = config.hidden_size // queries
    step = 8 * config.vocab_size + (2 << 20)
    if backend == "kvarn":
        return layers * StoreLayout(resolve(DEFAULT_PRESET), dim, dtype).nbytes(1, heads, capacity) + step
    # Under a mask transformers repeats K and V for every query head, one layer at a time.
    return 2 * capacity * dim * dtype.itemsize * (layers * heads + queries) + step


def largest_batch(backend, config, args, dtype):
    if args.device == "cpu":
        return 3
    free, _ = torch.cuda.mem_get_info()
    rows = (free - RESERVE) // bytes_a_row(backend, config, args.capacity, dtype)
    return max(1, rows // 8 * 8 if rows >= 8 else rows)


def fill(cache, tokens):
    """Makes every row of the cache hold `tokens` tokens: random ones in a plain cache, 32 random tiles in a packed."""
    for layer in cache.layers:
        binding = binding_of(layer.keys)
        layer.cumulative_length.fill_(tokens)
        if binding is None:
            layer.keys.normal_(), layer.values.normal_()
            continue
        store = binding.store
        group, dim, device = store.spec.group, store.layout.head_dim, store.records.device
        sample = PackedCache.empty(store.spec, 1, 1, 33 * group, dim, store.dtype, device)
        k, v = (torch.randn(1, 1, 33 * group, dim, device=device, dtype=store.dtype) for _ in range(2))
        sample.append(k, v, torch.arange(33 * group, device=device))
        for row in store.records:
            row.copy_(sample.records[0, 0, torch.randint(0, 32, row.shape[:2], device=device)])
        store.tail.copy_(sample.tail[0, 0].expand_as(store.tail))
        store.lengths.fill_(tokens)


def synchronize(args):
    if args.device != "cpu":
        torch.cuda.synchronize()


def peak(args):
    return 0 if args.device == "cpu" else torch.cuda.max_memory_allocated()


def new_cache(backend, config, batch, args, dtype):
    if backend == "kvarn":
        return hf.empty_static_cache(config, batch, args.capacity, dtype, args.device)
    cache = StaticCache(config=config, max_cache_len=args.capacity)
    dim = config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, config.num_key_value_heads, dim, dtype, torch.device(args.device))
    return cache


def release(args):
    """Frees what an earlier measurement holds: its graphs' pools and its cache."""
    torch._dynamo.reset()
    gc.collect()
    if args.device != "cpu":
        torch.cuda.empty_cache()


def measure(backend, batch, model, args):
    """One row: seconds of a decode step, the median of several runs of steps, and the memory it took."""
    release(args)
    counters.clear()
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    cache = new_cache(backend, model.config, batch, args, model.dtype)
    call = torch.compile(model, backend=backend, mode=args.mode, dynamic=False)
    ids = torch.randint(1, model.config.vocab_size, (batch, 1), device=args.device)

    def steps(count):
        nonlocal ids
        synchronize(args)
        start = time.perf_counter()
        for _ in range(count):
            logits = call(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1]
            ids = logits.argmax(-1, keepdim=True)
        assert bool(logits.isfinite().all())
        synchronize(args)
        return (time.perf_counter() - start) / count

    with torch.no_grad():
        compiling = steps(1)
        fill(cache, args.tokens)
        steps(3)  # CUDA graphs are recorded in these
        count = max(4, min(64, int(1.0 / steps(2))))
        times = [steps(count) for _ in range(3)]
    done = args.tokens + 5 + 3 * count
    for layer in cache.layers:
        binding = binding_of(layer.keys)
        assert (binding is not None) == (backend == "kvarn") and int(layer.cumulative_length) == done
        assert binding is None or binding.store.lengths.eq(done).all()
    seconds = statistics.median(times)
    return {"backend": backend, "batch": batch, "tokens": args.tokens, "capacity": args.capacity,
            "layers": args.layers, "dtype": str(model.dtype).removeprefix("torch."), "mode": args.mode or "default",
            "tokens_per_second": batch / seconds, "ms_per_step": 1e3 * seconds, "cache_bytes": cache_bytes(cache),
            "peak_bytes": peak(args), "cuda_graph_skips": counters["inductor"]["cudagraph_skips"],
            "compile_seconds": compiling}


def measure_largest(backend, model, args):
    release(args)  # before the free memory is looked at
    batch = largest_batch(backend, model.config, args, model.dtype)
    try:
        return measure(backend, batch, model, args)
    except torch.cuda.OutOfMemoryError as error:
        print(f"{backend}: batch {batch} does not fit ({str(error).splitlines()[0]})", flush=True)
    return measure(backend, max(1, batch * 7 // 8), model, args)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--capacity", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=31000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mode", default="reduce-overhead")
    parser.add_argument("--budget", type=float, default=160)
    parser.add_argument("--only", choices=["1", "largest"], help="one of the two batches")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this script")
    args = parser.parse_args()
    if args.tiny:
        args.layers, args.capacity, args.tokens = 2, 1024, 300
    if args.device == "cpu":
        args.mode = None
    return args


def main():
    args, began = parse(), time.perf_counter()
    transformers_logging.set_verbosity_error()
    check(args)
    model, rows = make(shape(args), args, torch.bfloat16), []
    for batch in [args.only] if args.only else ["1", "largest"]:
        for backend in ("kvarn", "inductor"):
            spent = time.perf_counter() - began
            if spent > args.budget:
                print(f"not run after {spent:.0f} s: {backend} at batch {batch}", flush=True)
                continue
            row = measure(backend, 1, model, args) if batch == "1" else measure_largest(backend, model, args)
            rows.append(row)
            show(row)
            if args.device != "cpu":
                write_rows("end_to_end", [row])
    for one, other in zip(rows[::2], rows[1::2], strict=False):
        print(f"batch {one['batch']} and {other['batch']}: {one['tokens_per_second'] / other['tokens_per_second']:.2f} "
              "times inductor's tokens per second", flush=True)


if __name__ == "__main__":
    main()
