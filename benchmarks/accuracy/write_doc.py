"""docs/accuracy.md from the JSON of run_formats.py and run_device.py: every figure in it is computed here.

    python write_doc.py RESULTS ../../docs/accuracy.md
"""

import argparse
import json
from pathlib import Path

import checks
import questions
import verdict

from kvarn_compile.eval import plots
from kvarn_compile.eval.report import COLUMNS, markdown, rows
from kvarn_compile.eval.results import load_all

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
    formats = {model: json.loads(path.read_text()) for model in verdict.MODELS
               if (path := args.results / f"formats_{model}.json").exists()}
    parts = [INTRO, verdict.answer(data), main_tables(data, args.target.parent / "accuracy"), greedy(data),
             questions.answers(formats, data), checks.encoders(args.results), checks.engines(args.results / "engines"),
             checks.libraries(args.results), reproduce()]
    args.target.write_text("\n".join(part.rstrip() + "\n" for part in parts))


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


def reproduce() -> str:
    return ("## Reproduce\n\n`kvarn eval` for any model and text. The runs above: `pack_model.py` cuts a model into "
            "pieces, `run_formats.py` answers the format questions, `run_device.py` measures, `collect.py` merges, "
            "`reference.py` adds the unquantized perplexity, `write_doc.py` writes this page (all in "
            "benchmarks/accuracy/). Predictions, written before the first run: `benchmarks/accuracy/PREDICTIONS.md`.\n")


if __name__ == "__main__":
    main()
