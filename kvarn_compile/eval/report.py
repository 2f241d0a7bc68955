"""Results as tables: for the terminal (rich) and for documents (Markdown)."""

from collections.abc import Iterable, Sequence
from math import exp, log
from typing import Any

UNQUANTIZED = "unquantized"
COLUMNS = ("method", "bits", "KL", "KL p99", "top-1", "ppl", "d ppl")


def averaged(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Summaries by method, all texts of one result file together (their windows count alike)."""
    texts = [t for t in data["results"].values() if t]
    names = [n for n in texts[0] if all(n in t for t in texts)] if texts else []
    merged = {}
    for name in names:
        parts = [t[name] for t in texts]
        mean = {key: sum(p[key] for p in parts) / len(parts) for key in ("kl", "kl_p99", "top1")}
        windows = [x for p in parts for x in p["kl_windows"]]
        bins = [sum(x) / len(x) for x in zip(*(p["kl_bins"] for p in parts), strict=True)]
        merged[name] = parts[0] | mean | {"ppl": exp(sum(log(p["ppl"]) for p in parts) / len(parts)),
                                          "kl_windows": windows, "kl_bins": bins}
    return merged


def rows(summaries: dict[str, dict[str, Any]], exact_ppl: float | None = None) -> list[tuple[str, ...]]:
    """Table rows by COLUMNS, best KL first; `exact_ppl` is the unquantized model's perplexity."""
    if exact_ppl is None and UNQUANTIZED in summaries:
        exact_ppl = summaries[UNQUANTIZED]["ppl"]
    table = []
    for name, s in sorted(summaries.items(), key=lambda item: item[1]["kl"]):
        change = "" if exact_ppl is None else f"{100 * (s['ppl'] / exact_ppl - 1):+.2f}%"
        table.append((name, f"{s['bits']:.2f}", number(s["kl"]), number(s["kl_p99"]), f"{100 * s['top1']:.1f}%",
                      f"{s['ppl']:.3f}", change))
    return table


def number(x: float) -> str:
    """A KL divergence with three digits that count."""
    return "0" if x == 0 else f"{x:.3g}" if x >= 0.001 else f"{x:.2e}" if x < 1e-5 else f"{x:.6f}".rstrip("0")


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [" | ".join(header), " | ".join(["---", *["---:"] * (len(header) - 1)]), *(" | ".join(row) for row in body)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def print_table(data: dict[str, Any]) -> None:
    """One table per text on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for text, summaries in data["results"].items():
        table = Table(title=f"{data['model']}, {text}, context {data['context']}")
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows(summaries):
            table.add_row(*row)
        console.print(table)
