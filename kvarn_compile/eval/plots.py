"""Results as pictures: what a bit buys, where in the context errors arise, which layer they come from."""

from pathlib import Path
from typing import Any

from kvarn_compile.eval.report import UNQUANTIZED, averaged

FORMATS = ("png", "svg")


def draw_all(data: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot of one result file that its data allow, as PNG and SVG: the files written."""
    summaries = {n: s for n, s in averaged(data).items() if n != UNQUANTIZED and s["kl"] > 0 and not set(n) & set("+,")}
    stem = folder / f"{data['model']}_{data['context']}"
    written = []
    if summaries:
        written += bits(summaries, data, stem)
        written += positions(summaries, data, stem)
    if any("layers" in s for s in summaries.values()):
        written += layers(summaries, data, stem)
    return written


def bits(summaries: dict[str, dict[str, Any]], data: dict[str, Any], stem: Path) -> list[Path]:
    """KL divergence against bits per element, all in."""
    figure, axes = _axes(data, "bits per element, all in", "mean KL divergence to the unquantized model, nats")
    for name, s in summaries.items():
        ours = _ours(name)
        axes.plot(s["bits"], s["kl"], "o" if ours else "s", color="C0" if ours else "C7")
        axes.annotate(name, (s["bits"], s["kl"]), xytext=(5, 3), textcoords="offset points", fontsize=7)
    axes.set_yscale("log")
    return _save(figure, stem, "bits")


def positions(summaries: dict[str, dict[str, Any]], data: dict[str, Any], stem: Path) -> list[Path]:
    """KL divergence along the context."""
    figure, axes = _axes(data, "position", "mean KL divergence, nats")
    for name, s in sorted(summaries.items(), key=lambda item: item[1]["kl"])[:8]:
        width = data["context"] / len(s["kl_bins"])
        axes.plot([(i + 0.5) * width for i in range(len(s["kl_bins"]))], s["kl_bins"], label=name,
                  linewidth=2 if _ours(name) else 1)
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    return _save(figure, stem, "positions")


def layers(summaries: dict[str, dict[str, Any]], data: dict[str, Any], stem: Path) -> list[Path]:
    """Relative squared error of keys, values and attention outputs by layer."""
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axes, side, title in zip(grid, ("k", "v", "out"), ("keys", "values", "attention output"), strict=True):
        for name, s in summaries.items():
            if "layers" in s and s["layers"][side][0] is not None:
                axes.plot(s["layers"][side], label=name, linewidth=2 if _ours(name) else 1)
        axes.set(title=f"{data['model']}: {title}", xlabel="layer", yscale="log")
    grid[0].set_ylabel("relative squared error")
    grid[0].legend(fontsize=6)
    return _save(figure, stem, "layers")


def _ours(name: str) -> bool:
    return name.startswith(("k", "kvarn")) and not name.startswith("kivi")


def _axes(data: dict[str, Any], x: str, y: str):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.set(title=f"{data['model']}, context {data['context']}", xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure, stem: Path, what: str) -> list[Path]:
    from matplotlib import pyplot

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}_{what}.{kind}") for kind in FORMATS]
    with pyplot.rc_context({"svg.hashsalt": "kvarn"}):  # equal data, equal bytes
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    pyplot.close(figure)
    return paths
