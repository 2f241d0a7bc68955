"""The figures of demo.py as two tables for a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show(figures: dict[str, Any], say: Console) -> None:
    """Print what was run, and what was measured."""
    f = figures
    versions = ", ".join(f"{name} {number}" for name, number in f["versions"].items())
    say.print(f"\n{f['model']} in {f['dtype']} on {f['threads']} CPU threads, inner compiler {f['inner']}; {versions}")
    say.print(_generation(f))
    say.print(_page(f))
    if f["picture"]:
        say.print(f"A key tile before and after rotation and normalization: {f['picture']}", soft_wrap=True)
    say.print(f"{f['seconds']:.0f} seconds")


def _generation(f: dict[str, Any]) -> Table:
    run = f"prompt of {f['prompt_tokens']} tokens, {f['tokens_generated']} generated"
    table = Table(title=f"KV cache of {f['cache_tokens']:,} tokens; {run}")
    for column in ("", "plain", f["preset"]):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("cache bytes", f"{f['cache_bytes_plain']:,}", f"{f['cache_bytes_packed']:,}")
    table.add_row(f"times smaller than {f['dtype']}", "1.00", f"{f['cache_bytes_plain'] / f['cache_bytes_packed']:.2f}")
    if f["dtype"] == "float32":
        table.add_row("times smaller than float16", "0.50", f"{f['cache_bytes_fp16'] / f['cache_bytes_packed']:.2f}")
    table.add_row("tokens per second", f"{f['tokens_per_second_plain']:.1f}", f"{f['tokens_per_second_packed']:.1f}")
    table.add_row("attentions reading a packed cache", "0", f"{f['rewritten']} of {f['attentions']}")
    table.add_row("same tokens until the first difference", "", f"{f['tokens_same_start']} of {f['tokens_generated']}")
    return table


def _page(f: dict[str, Any]) -> Table:
    table = Table(title=f"{f['text_tokens']:,} tokens of Jane Austen's Emma, in chunks of one tile")
    for column in ("cache", "perplexity", "same greedy token as plain"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    table.add_row("plain", f"{f['ppl_plain']:.2f}", "")
    table.add_row(f["preset"], f"{f['ppl_packed']:.2f}", f"{f['tokens_agree']:.1%}")
    table.add_row("upstream_k4v2_g128 (the published method)", f"{f['ppl_upstream']:.2f}", "")
    table.add_row("k16v16 (lossless)", f"{f['ppl_lossless']:.2f}", "")
    return table
