"""The unquantized model's perplexity on the final measurement's windows, into RESULTS/MODEL_CONTEXT.json.

run_device.py measures it along; this is for files that lack it. Pieces with other windows are refused.

    python reference.py PIECES RESULTS MODEL [--context 4096] [--device cpu]
"""

import argparse
import json
from pathlib import Path

from carried import load

from kvarn_compile.eval import harness
from kvarn_compile.eval.report import UNQUANTIZED


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model, windows = load(args.pieces, args.model, args.device)
    for text in ("wiki", "novels"):
        found = harness.evaluate(model, {text: windows[f"{text}_{args.context}"][:4].to(args.device)}, [])
        path = args.results / f"{args.model}_{args.context}.json"
        data = json.loads(path.read_text())
        closest = min((s for n, s in data["results"][text].items() if n != UNQUANTIZED), key=lambda s: s["kl"])
        exact = found[text][UNQUANTIZED]
        if abs(closest["ppl"] / exact["ppl"] - 1) > 0.02:
            raise SystemExit(f"{path}: {text}'s perplexity is {closest['ppl']:.3f} under its best method and "
                             f"{exact['ppl']:.3f} here: these pieces hold other windows")
        data["results"][text] |= found[text]
        path.write_text(json.dumps(data, indent=1) + "\n")
        print(args.model, text, found[text]["unquantized"]["ppl"], flush=True)


if __name__ == "__main__":
    main()
