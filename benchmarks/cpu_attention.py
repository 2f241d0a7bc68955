"""One token's attention on the CPU: packed codes as they are, the cache dequantized at every step, and a plain cache.

    OMP_NUM_THREADS=1 python benchmarks/cpu_attention.py

Checks the packed result against the float64 reference, then takes medians of the process's CPU time in one run and
appends a row per shape to results/cpu_attention.csv.
"""

import datetime
import platform
import statistics
import time

import torch
from rows import RESULTS, append

from kvarn import PackedCache, reference

SHAPES = ((3, 3, 64, 4096), (8, 4, 128, 4096), (8, 4, 128, 16384))


def milliseconds(run, repeats=7):
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def measure(heads, group, dim, tokens):
    k, v = torch.randn(2, 1, heads, tokens, dim)
    q, at = torch.randn(1, heads * group, 1, dim), torch.tensor([tokens - 1])
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    store = PackedCache.empty("k4v2_g128", 1, heads, tokens, dim, torch.float32)
    store.append(k, v, torch.arange(tokens))
    last = k[:, :, -1:], v[:, :, -1:], at

    def sdpa(keys, values):
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    read = reference.read_store(*store.tensors(), store.layout)
    expected = reference.attention(q, *(x[:, :, :tokens] for x in read), mask)
    torch.testing.assert_close(store.attend(q, *last, mask).double(), expected, rtol=1e-3, atol=1e-4)
    packed = milliseconds(lambda: store.attend(q, *last, mask))
    dequantized = milliseconds(lambda: sdpa(*store.unpack()))
    plain = milliseconds(lambda: sdpa(k, v))
    return {"kv_heads": heads, "group": group, "head_dim": dim, "tokens": tokens, "packed_ms": round(packed, 2),
            "dequantize_ms": round(dequantized, 2), "plain_float32_ms": round(plain, 2),
            "times_faster_than_dequantizing": round(dequantized / packed, 2), "times_plain": round(packed / plain, 2)}


def main():
    where = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
             "date": datetime.date.today().isoformat()}
    with torch.no_grad():
        rows = [measure(*shape) | where for shape in SHAPES]
    append(RESULTS / "cpu_attention.csv", rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
