"""Write the README's measured figures from the files that measurements left, so that none is typed by hand.

    kvarn demo --json --out docs > docs/demo.json && python docs/figures.py

The demo's JSON, CSVs of benchmarks/results, and the table of docs/accuracy.md, which its own script wrote. The tables
of docs/vllm.md too.
"""

import csv
import json
import sys
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


def others() -> str:
    """The figures that other scripts measured: memory, accuracy, kernels."""
    with (REPOSITORY / "benchmarks/results/peak_memory.csv").open() as file:
        memory = list(csv.DictReader(file))[-1]
    plain, packed, none = (int(memory[f"peak_{name}"]) / 2**20 for name in ("plain", "kvarn", "no_cache"))
    cache = int(memory["plain_cache_bytes"]) / 2**20
    accuracy = (REPOSITORY / "docs/accuracy.md").read_text().split("## The answer\n\n")[1].split("\n\n")[0]
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from tables import table

    return (f"Peak memory of a process whose cache of {int(memory['tokens']):,} tokens takes {cache:,.0f} MiB plain: "
            f"{plain:,.0f} MiB with it, {packed:,.0f} MiB with `empty_static_cache` and packed, {none:,.0f} MiB with a "
            f"cache of one chunk (`benchmarks/peak_memory.py`).\n\n"
            f"Accuracy in float32, KL to the unquantized model (`docs/accuracy.md`: method, every peer, "
            f"what is missing):\n\n{accuracy}\n\n"
            f"One decode step and a chunk over packed history, paged, against FlashAttention-3 on a bfloat16 cache: "
            f"the newest rows (`docs/kernels.md` has every row, and what was and was not run):\n\n"
            f"{table('against_fa3', newest=True)}\n\n"
            f"{serving()}\n")


def serving() -> str:
    """vLLM with and without kvarn: each variant's newest figures."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks/vllm"))
    from speed import RATES, latest

    found = latest(REPOSITORY / "benchmarks/results/vllm_speed.csv")
    names = ["bf16", *(name for name in found if name != "bf16")]
    lines = ["|  | bf16 | " + " | ".join(f"`{name}` | times" for name in names[1:]) + " |",
             "| --- | ---: |" + " ---: | ---: |" * len(names[1:])]
    for what, title in RATES.items():
        if what not in found["bf16"]:
            continue
        base, cells = float(found["bf16"][what]["value"]), []
        for name in names[1:]:
            figure = found[name].get(what)
            times = f"{figure['times']:.2f}" if figure and figure["times"] else ""
            cells.append(f"{float(figure['value']):,.0f} | {times}" if figure else " | ")
        lines.append(f"| {title} | {base:,.0f} | " + " | ".join(cells) + " |")
    row = found["bf16"]["kv_tokens"]
    other = [f"`{name}` of {', '.join(sorted(commits))}, times the bf16 beside it" for name, figures in found.items()
             if (commits := {figure["commit"] for figure in figures.values()} - {row["commit"]})]
    return (f"vLLM {row['vllm']} on one {row['card']}, the shape of Qwen3-32B with {row['layers']} layers, a pool "
            f"of {int(row['pool_bytes']) / 1e9:.0f} GB, prompts of {int(row['prompt']):,} tokens, CUDA graphs, "
            f"commit {'; '.join([row['commit'], *other])} (`benchmarks/vllm/speed.py`):\n\n" + "\n".join(lines) + "\n")


def perplexity() -> str:
    """What presets cost under vLLM's CPU build: the last row of each model, preset and balance."""
    with (REPOSITORY / "benchmarks/vllm/perplexity.csv").open() as file:
        rows = {(row["model"], row["preset"], row["preset"] != "stock" and row["balance"]): row
                for row in csv.DictReader(file)}
    lines = ["| model | preset | balance | perplexity | top token | blocks |",
             "| --- | --- | --- | ---: | ---: | ---: |"]
    for (model, preset, balance), row in sorted(rows.items(), key=lambda item: (item[0][0], float(item[1]["blocks"]))):
        source = balance if balance in ("off", "weights") else "a file" if balance else ""
        lines.append(f"| {model} | {preset} | {source} | {row['perplexity']} | {float(row['same_top_token']):.1%} | "
                     f"{row['blocks']} |")
    return "\n".join(lines) + "\n"


def between(text: str, begin: str, end: str, new: str) -> str:
    """The text with `new` between the marks."""
    head, rest = text.split(begin)
    return head + begin + new + end + rest.split(end)[1]


def updated(readme: str, figures: dict[str, Any]) -> str:
    """The README with the marked block replaced."""
    return between(readme, BEGIN, END, block(figures) + "\n" + others())


if __name__ == "__main__":
    readme = REPOSITORY / "README.md"
    figures = json.loads((REPOSITORY / "docs/demo.json").read_text())
    readme.write_text(updated(readme.read_text(), figures))
    page = REPOSITORY / "docs/vllm.md"
    text = between(page.read_text(), BEGIN, END, serving())
    page.write_text(between(text, "<!-- perplexity: written by docs/figures.py -->\n", "<!-- end of perplexity -->\n",
                            perplexity()))
