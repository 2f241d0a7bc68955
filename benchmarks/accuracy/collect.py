"""Merge what the processes of one measurement wrote (run_device.py) into one file per model and context.

    python collect.py FOLDER... --out results

What a file held before stays only if it was measured on the same windows, which the unquantized perplexity tells.
"""

import argparse
import json
from pathlib import Path

from kvarn_compile.eval.report import UNQUANTIZED


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    merged, greedy = {}, {}
    for path in sorted(path for folder in args.folders for path in folder.rglob("*.json")):
        data = json.loads(path.read_text())
        if "greedy" in data:
            greedy[data["model"]] = data
            continue
        whole = merged.setdefault(path.name, data | {"results": {}})
        for text, methods in data["results"].items():
            whole["results"].setdefault(text, {}).update(
                {name: s for name, s in methods.items() if not name.startswith(f"{UNQUANTIZED},")})
    for name, data in merged.items():
        if data["context"] == 1024 and data["model"] in greedy:
            rows = {text: slice(4 * i, 4 * i + 4) for i, text in enumerate(data["results"])}
            for method, equal in greedy[data["model"]]["greedy"].items():
                for text in data["results"]:
                    if method in data["results"][text]:
                        data["results"][text][method]["greedy"] = equal[rows[text]]
        target = args.out / name
        old = json.loads(target.read_text())["results"] if target.exists() else {}
        if old and same_windows(old, data["results"]):
            data["results"] = {text: methods | data["results"].get(text, {}) for text, methods in old.items()}
        elif old:
            print(target, "held other windows: replaced")
        target.write_text(json.dumps(data, indent=1) + "\n")
        print(target, {text: len(methods) for text, methods in data["results"].items()})


def same_windows(old: dict, new: dict) -> bool:
    """True if every text of both results has the same unquantized perplexity (up to rounding of two machines)."""
    pairs = [(old[text].get(UNQUANTIZED), new[text].get(UNQUANTIZED)) for text in old if text in new]
    return bool(pairs) and all(a and b and abs(a["ppl"] / b["ppl"] - 1) < 1e-4 for a, b in pairs)


if __name__ == "__main__":
    main()
