"""Tables of docs/kernels.md and a plot, from results/*.csv; rewrites what lies between the markers."""

import csv
import math
from pathlib import Path

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "kernels.md"
COLUMNS = {
    "decode": ("batch", "kv_heads", "group", "tokens", "head_dim", "ms", "packed_gb_s", "bf16_read_ms", "times_faster",
               "sdpa_ms", "error"),
    "growth": ("batch", "tokens", "ms", "packed_gb_s", "times_faster"),
    "write": ("what", "head_dim", "warps", "maxnreg", "ms", "of_copy", "bf16_write_ms", "bytes_differ"),
    "prefill": ("history", "chunk", "kv_heads", "group", "head_dim", "ms", "sdpa_masked_ms", "sdpa_unmasked_ms",
                "error"),
}


def rows(name: str) -> list[dict]:
    with (HERE / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def cell(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    return "" if math.isnan(value) else text if value.is_integer() and "." not in text else f"{value:.3g}"


def table(name: str) -> str:
    found, columns = rows(name), COLUMNS[name]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row[c]) for c in columns) + " |" for row in found]
    where = sorted({(r["card"], r["torch"], r["triton"], r["date"]) for r in found})
    lines += ["", *(f"{card}, torch {torch}, Triton {triton}, {date}." for card, torch, triton, date in where)]
    return "\n".join(lines)


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = sorted(rows("growth"), key=lambda r: int(r["tokens"]))
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
