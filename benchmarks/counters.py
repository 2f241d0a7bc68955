"""Hardware counters of the kernels in their default configurations: results/counters.csv, by Nsight Compute.

    python benchmarks/counters.py            profiles each workload in a process of its own
    python benchmarks/counters.py decode     runs one, as the profiler's child

Clocks are left as they are, so times are near those of the benchmarks, not equal to them.
"""

import csv
import io
import subprocess
import sys

import torch
from common import random_store, show, write_rows

from kvarn.cache import PackedCache

WORKLOADS = {  # kernel, batch, tokens, head_dim, query heads per KV head; 8 KV heads
    "decode": ("decode_tiles", 32, 16384, 128, 8), "decode-one": ("decode_tiles", 1, 32768, 128, 8),
    "decode-64": ("decode_tiles", 32, 16384, 64, 8), "decode-256": ("decode_tiles", 16, 16384, 256, 8),
    "combine": ("combine_parts", 32, 16384, 128, 8), "fill": ("fill_tiles", 32, 8192, 128, 8),
}
METRICS = {
    "us": "gpu__time_duration.sum", "instructions": "smsp__inst_executed.sum",
    "registers": "launch__registers_per_thread", "programs": "launch__grid_size",
    "resident_warps": "sm__warps_active.avg.per_cycle_active",
    "issue_busy_pct": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "eligible_warps": "smsp__warps_eligible.avg.per_cycle_active",
    "dram_pct": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_pct": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_pct": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "alu_pct": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "tensor_pct": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    **{f"wait_{name}": f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio" for name, stall in (
        ("memory", "long_scoreboard"), ("shared", "short_scoreboard"), ("fixed", "wait"), ("barrier", "barrier"),
        ("pipe", "math_pipe_throttle"), ("dispatch", "dispatch_stall"), ("code", "no_instruction"),
        ("not_chosen", "not_selected"))},
}
"""Column -> metric. The wait columns are warps waiting for it for each instruction issued."""


def run(name: str) -> None:
    """The workload three times: the profiler takes the last."""
    _, batch, tokens, dim, group = WORKLOADS[name]
    if name == "fill":
        cache = PackedCache.empty("k4v2_g128", batch, 8, tokens + 128, dim, torch.bfloat16, "cuda")
        k, v = (torch.randn(batch, 8, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for _ in range(3):
            cache.append(k, v, torch.arange(tokens, device="cuda"))
    else:
        cache = random_store("k4v2_g128", batch, 8, tokens, dim)
        q = torch.randn(batch, 8 * group, 1, dim, device="cuda", dtype=torch.bfloat16)
        own = torch.zeros(batch, 8, 1, dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(3):
            cache.attend(q, own, own, torch.tensor([tokens - 1], device="cuda"), None, tokens)
    torch.cuda.synchronize()


def counters(name: str) -> dict:
    """The row of one workload."""
    kernel, batch, tokens, dim, group = WORKLOADS[name]
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--metrics",
               ",".join(METRICS.values()), "-k", f"regex:{kernel}", "-s", "2", "-c", "1", sys.executable, __file__,
               name]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    table = list(csv.reader(io.StringIO(text[text.index('"ID"'):])))
    found = dict(zip(table[0], table[-1], strict=True))
    values = {column: float(found[metric].replace(",", "")) for column, metric in METRICS.items() if metric in found}
    values["us"] /= 1000
    shape = {"workload": name, "kernel": kernel, "batch": batch, "tokens": tokens, "head_dim": dim, "group": group}
    return shape | {column: values.get(column, float("nan")) for column in METRICS}


def main() -> None:
    rows = []
    for name in WORKLOADS:
        rows.append(counters(name))
        show(rows[-1])
    write_rows("counters", rows)


if __name__ == "__main__":
    run(sys.argv[1]) if len(sys.argv) > 1 else main()
