"""docs/accuracy.md from the JSON of run_formats.py and run_device.py: every figure in it is computed here.

    python write_doc.py RESULTS ../../docs/accuracy.md
"""

import argparse
import json
import re
from pathlib import Path

import questions

from kvarn_compile.eval import plots
from kvarn_compile.eval.report import COLUMNS, averaged, markdown, number, rows
from kvarn_compile.eval.results import load_all

OURS, OURS44, UPSTREAM, UPSTREAM44 = "k4v2_g128", "k4v4_g128", "upstream_k4v2_g128", "upstream_k4v4_g128"
MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "gemma-3-270m")

INTRO = """# Accuracy

What a packed cache costs real language models, against every method it competes with. Written by
`benchmarks/accuracy/write_doc.py` from the JSON beside it; no figure here is typed by hand.

**How it is measured.** A model reads windows of real text in chunks of one tile (128 tokens). Each chunk attends the
earlier tiles as the method stored them and its own tokens exactly, as in decoding, so errors accumulate through layers
and along the context. Weights and arithmetic are float32 (16-bit noise alone is a KL of 0.001). For our presets the
quantizer is the product's own: tokens pass through the tail's 16-bit words into records and come back from their bytes.
KL is the divergence in nats of the next-token distribution from the same model's unquantized run; bits count everything
at that context: codes, scales, exact rows, tails, sinks. Text: wiki (shortened Wikipedia articles) and novels (Jane
Austen). Models are built from 4- to 8-bit GGUF files, so their perplexities are not the original models'.

    kvarn eval --model MODEL --text wiki.txt --text novels.txt --methods all --context 4096
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    data = {(d["model"], d["context"]): d for d in load_all(args.results)}
    formats = {m: json.loads(p.read_text()) for m in MODELS if (p := args.results / f"formats_{m}.json").exists()}
    parts = [INTRO, verdict(data), main_tables(data, args.target.parent / "accuracy"), greedy(data),
             questions.answers(formats, data), engines(args.results / "engines"), reproduce()]
    args.target.write_text("\n".join(part.rstrip() + "\n" for part in parts))


def measured(data):
    """The widest context below 16k of every model that was measured."""
    for model in MODELS:
        found = [c for m, c in data if m == model and c <= 4096]
        if found:
            yield model, max(found), averaged(data[model, max(found)])


def verdict(data) -> str:
    """Against upstream and against the best peer of at most our bits, per model."""
    table, values = [], {}
    for model, context, found in measured(data):
        ours, theirs = found[OURS], found[UPSTREAM]
        peers = {n: s for n, s in found.items() if s["bits"] <= ours["bits"] and is_peer(n)}
        best = min(peers, key=lambda n: peers[n]["kl"]) if peers else None
        loss = perplexity(data, model)
        values[model] = (ours["kl"], theirs["kl"], peers[best]["kl"] if best else None, found[OURS44]["kl"],
                         found[UPSTREAM44]["kl"], loss)
        table.append((f"{model}, {context}", number(ours["kl"]), number(theirs["kl"]),
                      f"{100 * (ours['kl'] / theirs['kl'] - 1):+.0f}%",
                      f"{best}: {number(peers[best]['kl'])}" if best else "none measured",
                      number(found[OURS44]["kl"]), number(found[UPSTREAM44]["kl"]),
                      "" if loss is None else f"{100 * loss:+.2f}%"))
    header = ("model, context", "k4v2 KL", "upstream k4v2 with sink", "change", "best peer of at most our bits",
              "k4v4 KL", "upstream k4v4 with sink", "k4v4 perplexity*")
    return ("## The answer\n\n" + markdown(header, table)
            + "\n*Against the unquantized model's, at the widest context where that was run: 4,096 or else 1,024.\n\n"
            + questions.verdict(values) + small_samples(data))


def small_samples(data) -> str:
    """A line for every model of the table above that was measured on little text."""
    lines = ""
    for model, context, _ in measured(data):
        positions = sum(summaries[OURS]["positions"] for summaries in data[model, context]["results"].values())
        if positions < 16384:
            device = data[model, context]["settings"].get("device", "a CPU")
            lines += (f"- {model} was measured on {positions:,} positions only, in windows of {context:,} tokens, of "
                      f"which upstream's sink covers {100 * 128 / context:.1f}%, on {device}: a small sample.\n")
    return lines


def perplexity(data, model) -> float | None:
    """Relative change of perplexity under k4v4 at the widest context where the unquantized one is known, up to 4k."""
    for context in (4096, 1024):
        found = averaged(data[model, context]) if (model, context) in data else {}
        if "unquantized" in found and OURS44 in found:
            return found[OURS44]["ppl"] / found["unquantized"]["ppl"] - 1
    return None


def is_peer(name: str) -> bool:
    return name != "unquantized" and not re.match(r"k\d+v|kvarn", name)


def main_tables(data, folder: Path) -> str:
    text = ["## Every method\n"]
    for (model, context), found in data.items():
        if context > 4096:
            continue
        for name, summaries in found["results"].items():
            text += [f"### {model}, {name}, context {context}\n", markdown(COLUMNS, rows(summaries))]
        for path in plots.draw_all(found, folder):
            if path.suffix == ".svg":
                text.append(f"![{path.stem}](accuracy/{path.name})\n")
    return "\n".join(text)


def greedy(data) -> str:
    """Tokens written before the first different one, of 128."""
    table, names = [], []
    for (model, context), found in data.items():
        equal = {}
        for summaries in found["results"].values():
            for name, s in summaries.items():
                equal.setdefault(name, []).extend(s.get("greedy", []))
        equal = {n: x for n, x in equal.items() if x}
        if equal:
            names = names or list(equal)
            table.append((f"{model}, {context}", *(f"{sum(equal[n]) / len(equal[n]):.0f}" if n in equal else ""
                                                   for n in names)))
    if not table:
        return ""
    return ("## Greedy continuations\n\nTokens of a greedy continuation before the first that differs from the "
            "unquantized model's, of 128, mean over eight prompts (a few near-ties decide each of these numbers):\n\n"
            + markdown(("model, prompt", *names), table))


def engines(folder: Path) -> str:
    """The compiled model beside the harness."""
    found = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/*.json")}
    if set(found) != {"harness", "compiled"}:
        return ""
    table = []
    for text, summaries in found["harness"]["results"].items():
        for name, s in summaries.items():
            other = found["compiled"]["results"][text][name]
            table.append((name, number(s["kl"]), number(other["kl"]), f"{s['ppl']:.4f}", f"{other['ppl']:.4f}"))
    about = found["harness"]
    return ("## The compiled model gives the same numbers\n\n`--engine compiled` runs the model through "
            "`torch.compile(backend=\"kvarn\")` over a static cache: packed records, CPU ops, no harness code in the "
            f"attention. {about['model']}, {about['context']} tokens. Where float32 rounding tips one code over, every "
            "later layer sees other numbers, so the two agree as two draws of the same rounding noise do; the lossless "
            "preset, which has none, agrees to float32.\n\n"
            + markdown(("preset", "KL, harness", "KL, compiled", "ppl, harness", "ppl, compiled"), table))


def reproduce() -> str:
    return ("## Reproduce\n\n`kvarn eval` for any model and text. The runs above: `pack_model.py` cuts a model into "
            "pieces, `run_formats.py` answers the format questions, `run_device.py` measures, `collect.py` merges, "
            "`reference.py` adds the unquantized perplexity, `write_doc.py` writes this page (all in "
            "benchmarks/accuracy/). Predictions, written before the first run: `benchmarks/accuracy/PREDICTIONS.md`.\n")


if __name__ == "__main__":
    main()
