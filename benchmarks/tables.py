"""Tables of docs/kernels.md and a plot, from results/*.csv; rewrites what lies between the markers."""

import csv
import math
from pathlib import Path

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "kernels.md"
COLUMNS = {
    "against_fa3": ("card", "commit", "what", "batch", "kv_heads", "group", "tokens", "head_dim", "ms", "fa3_ms",
                    "times_faster", "error"),
    "decode": ("card", "commit", "batch", "kv_heads", "group", "tokens", "head_dim", "ms", "packed_gb_s",
               "bf16_read_ms", "times_faster", "sdpa_ms"),
    "explore_decode_early": ("batch", "heads", "group", "tokens", "dim", "n", "paged", "splits", "num_warps",
                             "num_stages", "maxnreg", "ms", "times_faster"),
    "growth": ("card", "commit", "batch", "tokens", "ms", "packed_gb_s", "times_faster"),
    "write": ("card", "commit", "what", "head_dim", "warps", "maxnreg", "ms", "of_copy", "bf16_write_ms",
              "bytes_differ"),
    "explore_write": ("what", "head_dim", "warps", "maxnreg", "ms", "of_copy"),
    "prefill": ("card", "commit", "history", "chunk", "kv_heads", "group", "head_dim", "ms", "sdpa_masked_ms",
                "sdpa_unmasked_ms", "error"),
    "end_to_end": ("card", "commit", "backend", "batch", "tokens", "capacity", "layers", "mode",
                   "tokens_per_second", "ms_per_step", "cache_bytes", "peak_bytes", "cuda_graph_skips"),
    "counters": ("workload", "us", "registers", "resident_warps", "issue_busy_pct", "eligible_warps", "dram_pct",
                 "l2_pct", "l1_pct", "alu_pct", "tensor_pct", "wait_memory", "wait_shared", "wait_fixed",
                 "wait_barrier"),
    "stalls": ("workload", "commit", "memory_pct", "shared_pct", "fixed_pct", "issued_pct",
               "barrier_pct", "not_chosen_pct", "instructions", "global_sectors", "spill_sectors",
               "shared_wavefronts", "shared_ideal"),
    "machine_code": ("kernel", "target", "warps", "registers", "programs_a_processor", "stack", "matrix",
                     "instructions"),
}
SHAPE = COLUMNS["explore_decode_early"][:7]
WHERE = ("card", "torch", "triton", "date", "commit")


def rows(name: str) -> list[dict]:
    """A file's rows; of a grid, the fastest of each shape."""
    with (HERE / "results" / f"{name}.csv").open() as file:
        found = list(csv.DictReader(file))
    if name != "explore_decode_early":
        return found
    best: dict[tuple, dict] = {}
    for row in sorted(found, key=lambda r: float(r["ms"])):
        best.setdefault(tuple(row[key] for key in SHAPE), row)
    return list(best.values())


def cell(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    if math.isnan(value) or (value.is_integer() and "." not in text):
        return "" if math.isnan(value) else text
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(name: str, newest: bool = False) -> str:
    """A file's rows as Markdown; with `newest` those of its last row's commit."""
    found, columns = rows(name), COLUMNS[name]
    if newest:
        found = [row for row in found if row["commit"] == found[-1]["commit"]]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row[c]) for c in columns) + " |" for row in found]
    told = [[(key, row[key]) for key in WHERE if key in row] for row in found]
    where = sorted({", ".join(text if key in ("card", "date") else f"{key} {text}" for key, text in row)
                    for row in told})
    lines += ["", *(f"{line}." for line in where)]
    return "\n".join(lines)


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = rows("growth")
    found = sorted((r for r in found if r["commit"] == found[-1]["commit"]), key=lambda r: int(r["tokens"]))
    tokens = [int(r["tokens"]) for r in found]
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.loglog(tokens, [float(r["ms"]) for r in found], "o-", label="packed, measured")
    axes.loglog(tokens, [float(r["bf16_read_ms"]) for r in found], "k--", label="bf16 read at copy bandwidth")
    axes.set(xlabel="tokens in the cache", ylabel="ms per decode step and layer",
             title=f"Decode attention, batch {found[0]['batch']}, {found[0]['card']}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    text = DOC.read_text()
    for name in COLUMNS:
        begin, end = f"<!-- table {name} -->\n", f"\n<!-- end {name} -->"
        head, rest = text.split(begin)
        text = head + begin + table(name) + end + rest.split(end, 1)[1]
    DOC.write_text(text)
    plot(HERE / "results" / "growth.png")


if __name__ == "__main__":
    main()
