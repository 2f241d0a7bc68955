"""A plot of each variant's newest figures in vllm_speed.csv, as a multiple of stock bfloat16.

    python benchmarks/vllm/plot_speed.py [--csv FILE] [--out FILE]
"""

import argparse
from pathlib import Path

from speed import RATES, RESULTS, latest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS / "vllm_speed.csv")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_speed.png")
    args = parser.parse_args()
    plot(latest(args.csv), args.out)


def plot(found, path):
    """Bars by measurement, one color per variant; `found` as latest gives it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = found["bf16"]
    names = [name for name in RATES if name in base]
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(found)
    for i, (variant, row) in enumerate(found.items()):
        have = [x for x, name in enumerate(names) if name in row and row[name]["times"]]
        ratios = [row[names[x]]["times"] for x in have]
        at = [x + (i - (len(found) - 1) / 2) * width for x in have]
        axes.bar_label(axes.bar(at, ratios, width, label=variant), fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylabel("times bfloat16")
    axes.axhline(1, color="black", linewidth=0.8)
    row = base[names[0]]
    axes.set_title(f"{row['card']}, vLLM {row['vllm']}, {row['layers']} layers of Qwen3-32B's shape, {row['date']}")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
