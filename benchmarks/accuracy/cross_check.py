"""Peers of ours beside the maintained implementation of the same method: transformers' QuantizedCache.

    pip install optimum-quanto hqq
    python cross_check.py MODEL --text wiki.txt --text novels.txt --out results/cross_check_MODEL.json

Both read the same windows in chunks of one tile. A library's cache hands a chunk the history as it stores it and the
chunk itself as it is, which is the harness' regime; that it then quantizes its whole history again, from what it had
rounded before, is its own.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvarn_compile.eval import harness, hf, text
from kvarn_compile.eval.harness import CHUNK
from kvarn_compile.eval.methods import make
from kvarn_compile.eval.methods.base import Facts
from kvarn_compile.eval.metrics import Scores


def cases(head_dim: int) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """By description: our method, the library's backend and its settings (axis -1: channels, 0: tokens; hqq: 1)."""
    kivi = {"axis_key": -1, "axis_value": 0, "q_group_size": 32, "residual_length": CHUNK}
    token = {"q_group_size": head_dim, "residual_length": CHUNK}
    return {
        "KIVI, 4 bits, groups of 32": ("kivi_k4v4", "quanto", {"nbits": 4, **kivi}),
        "KIVI, 2 bits, groups of 32": ("kivi_k2v2", "quanto", {"nbits": 2, **kivi}),
        "int4 per token and head": ("int4_per_token", "quanto", {"nbits": 4, "axis_key": 0, "axis_value": 0, **token}),
        "int4 per token and head, steps searched": ("int4_per_token", "hqq",
                                                    {"nbits": 4, "axis_key": 1, "axis_value": 1, **token}),
        "float8 e4m3, one scale per tensor": ("fp8_e4m3", "fp8", {}),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=2)
    args = parser.parse_args()
    model, tokenizer = hf.load_model(args.model, "cpu"), hf.load_tokenizer(args.model)
    windows = {path.stem: text.windows(text.read_ids(tokenizer, path), args.windows, args.context,
                                       text.start_ids(tokenizer)) for path in args.text}
    shape = hf.model_shape(model)
    known = cases(shape.head_dim)
    methods = [make(name, Facts(shape)) for name in dict.fromkeys(ours for ours, *_ in known.values())]
    ours = harness.evaluate(model, windows, methods)
    found = []
    for about, (name, backend, settings) in known.items():
        theirs = library(model, windows, backend, settings)
        found.append({"about": about, "method": name, "backend": backend, "settings": settings,
                      "ours": {t: ours[t][name] for t in windows}, "theirs": theirs})
        print(about, {t: (round(ours[t][name]["kl"], 5), round(theirs[t]["kl"], 5)) for t in windows}, flush=True)
    packages = ("torch", "transformers", "optimum-quanto", "hqq")
    data = {"model": Path(args.model).name, "context": args.context, "windows": args.windows,
            "versions": {name: version(name) for name in packages}, "cases": found}
    args.out.write_text(json.dumps(data, indent=1) + "\n")


@torch.no_grad()
def library(model: Any, texts: dict[str, Tensor], backend: str, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Summaries by text of the model over transformers' own quantized cache, beside its plain cache."""
    from transformers import DynamicCache, QuantizedCache

    found = {}
    with hf.own_attention(model):
        for name, ids in texts.items():
            plain, packed = DynamicCache(config=model.config), QuantizedCache(backend, model.config, **settings)
            targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1)
            scores = Scores()
            for part, target in zip(ids.split(CHUNK, 1), targets.split(CHUNK, 1), strict=True):
                scores.add(hf.run_cached(model, part, plain), hf.run_cached(model, part, packed), target)
            found[name] = scores.summary()
    return found


if __name__ == "__main__":
    main()
