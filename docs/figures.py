"""Write the README's measured figures from the demo's JSON, so that none is typed by hand.

    kvarn demo --json --out docs > docs/demo.json && python docs/figures.py
"""

import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
BEGIN, END = "<!-- figures: written by docs/figures.py -->\n", "<!-- end of figures -->\n"


def block(f: dict[str, Any]) -> str:
    """The Markdown between the marks, from the keys of `kvarn demo --json`."""
    versions = ", ".join(f"{name} {number}" for name, number in f["versions"].items())
    rows = [
        ("", "plain cache", f"`{f['preset']}`"),
        ("---", "---:", "---:"),
        (f"bytes of a cache of {f['cache_tokens']:,} tokens", f"{f['cache_bytes_plain']:,}",
         f"{f['cache_bytes_packed']:,}"),
        ("times smaller than float16", f"{f['cache_bytes_fp16'] / f['cache_bytes_plain']:.2f}",
         f"{f['cache_bytes_fp16'] / f['cache_bytes_packed']:.2f}"),
        ("attentions that read a packed cache", "0", f"{f['rewritten']} of {f['attentions']}"),
        (f"perplexity on {f['text_tokens']:,} tokens of *Emma*", f"{f['ppl_plain']:.2f}", f"{f['ppl_packed']:.2f}"),
        ("same greedy token as plain, on that page", "", f"{f['tokens_agree']:.1%}"),
        (f"tokens before the first difference, of {f['tokens_generated']}", "", f"{f['tokens_same_start']}"),
        ("tokens per second on the CPU", f"{f['tokens_per_second_plain']:.1f}", f"{f['tokens_per_second_packed']:.1f}"),
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (f"{f['model']} in {f['dtype']}, {f['threads']} CPU threads ({f['cpu']}), inner compiler `{f['inner']}`, "
            f"{f['seconds']:.0f} s in all; {versions}.\n\n{table}\n\n"
            f"On the same page the published method (`upstream_k4v2_g128`, its first 128 tokens unquantized) has "
            f"perplexity {f['ppl_upstream']:.2f}, the lossless `k16v16` {f['ppl_lossless']:.2f}.\n")


def updated(readme: str, figures: dict[str, Any]) -> str:
    """The README with the marked block replaced."""
    head, rest = readme.split(BEGIN)
    return head + BEGIN + block(figures) + END + rest.split(END)[1]


if __name__ == "__main__":
    readme = REPOSITORY / "README.md"
    figures = json.loads((REPOSITORY / "docs/demo.json").read_text())
    readme.write_text(updated(readme.read_text(), figures))
