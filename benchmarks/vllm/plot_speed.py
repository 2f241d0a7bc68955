"""A plot of the last row of each variant in vllm_speed.csv, as a multiple of stock bfloat16.

    python benchmarks/vllm/plot_speed.py [--csv FILE] [--out FILE]
"""

import argparse
import csv
from pathlib import Path

from speed import RATES, RESULTS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS / "vllm_speed.csv")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_speed.png")
    args = parser.parse_args()
    with args.csv.open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    plot(rows, args.out)


def plot(rows, path):
    """Bars by measurement, one color per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = rows["bf16"]
    names = [name for name in RATES if base[name]]
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(rows)
    for i, (variant, row) in enumerate(rows.items()):
        ratios = [float(row[name] or 0) / float(base[name]) for name in names]
        at = [x + (i - (len(rows) - 1) / 2) * width for x in range(len(names))]
        axes.bar_label(axes.bar(at, ratios, width, label=variant), fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(names)), [name.replace("_tok_s", "").replace("_", " ") for name in names])
    axes.set_ylabel("times bfloat16")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_title(f"{base['card']}, vLLM {base['vllm']}, {base['layers']} layers of Qwen3-32B's shape, {base['date']}")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
