"""Merge what the processes of one measurement wrote (run_device.py) into one file per model and context.

    python collect.py FOLDER... --out results
"""

import argparse
import json
from pathlib import Path


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
        whole = merged.setdefault(path.name, data)
        for text, methods in data["results"].items():
            whole["results"].setdefault(text, {}).update(methods)
    for name, data in merged.items():
        if data["context"] == 1024 and data["model"] in greedy:
            rows = {text: slice(4 * i, 4 * i + 4) for i, text in enumerate(data["results"])}
            for method, equal in greedy[data["model"]]["greedy"].items():
                for text in data["results"]:
                    if method in data["results"][text]:
                        data["results"][text][method]["greedy"] = equal[rows[text]]
        target = args.out / name
        if target.exists():  # keep what reference.py added
            for text, methods in json.loads(target.read_text())["results"].items():
                data["results"][text] = methods | data["results"].get(text, {})
        target.write_text(json.dumps(data, indent=1) + "\n")
        print(target, {text: len(methods) for text, methods in data["results"].items()})


if __name__ == "__main__":
    main()
