"""One process of the final measurement on a machine that gets the models piece by piece (pack_model.py).

    python run_device.py PIECES OUT MODEL PART OF [--kind main|long|greedy|balance]

Waits for the model's pieces, measures its share of the methods, writes OUT/MODEL_KIND_PART/MODEL_CONTEXT.json.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from balances import from_key_weights
from carried import load

from kvarn_compile.eval import calibrate, greedy, harness
from kvarn_compile.eval.hf import model_shape
from kvarn_compile.eval.methods import make
from kvarn_compile.eval.methods.base import Facts
from kvarn_compile.eval.results import Results

MAIN = ["k4v2_g128", "upstream_k4v2_g128", "k4v4_g128", "upstream_k4v4_g128", "k4v2_g128+tailread",
        "k4v4_g128+tailread", "turboquant_3bit_nc", "kivi_k4v2", "turboquant_4bit_nc", "int4_per_token", "k3v2_g128",
        "fp8_e4m3", "turboquant_k3v4_nc", "turboquant_k8v4", "kivi_k2v2", "quarot_k4v2", "quarot_k4v4",
        "k4v2_g128+unbalanced", "k3v3_g128"]
LONG = ["k4v2_g128", "upstream_k4v2_g128", "k4v4_g128"]
GREEDY = ["k4v2_g128", "upstream_k4v2_g128", "k4v4_g128", "upstream_k4v4_g128", "turboquant_3bit_nc", "kivi_k4v2",
          "fp8_e4m3"]
AT_ONCE = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("part", type=int)
    parser.add_argument("of", type=int)
    parser.add_argument("--kind", default="main")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    began = time.time()
    model, windows = load(args.pieces, args.model, args.device)
    shape, device = model_shape(model), args.device
    facts = Facts(shape, calibrate.from_random(model, device))
    print(args, f"{time.time() - began:.0f} s to load", flush=True)
    out = args.out / f"{args.model}_{args.kind}_{args.part}"

    def texts(context, count=None):
        return {text: windows[f"{text}_{context}"][:count].to(device) for text in ("wiki", "novels")}

    def run(context, names, given=facts, rename=lambda name: name, **options):
        about = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
                 "dtype": "float32", "seed": 0, "balance": "random", "shape": vars(shape)}
        file = Results(out, args.model, context, about)
        for first in range(0, len(names), AT_ONCE):
            some = names[first : first + AT_ONCE]
            results = harness.evaluate(model, texts(context, 4), [make(n, given) for n in some], **options)
            named = {t: {rename(n): r for n, r in found.items()} for t, found in results.items()}
            file.add(named)
            kl = {t: {n: round(r["kl"], 5) for n, r in found.items()} for t, found in named.items()}
            print(args.model, context, f"{time.time() - began:.0f} s", kl, flush=True)

    if args.kind == "main":
        run(4096, MAIN[args.part :: args.of])
    elif args.kind == "long":
        run(16384, LONG)
    elif args.kind == "balance":
        sources = {"key weights": from_key_weights(model), "both weights": calibrate.from_weights(model)}
        for source, scales in sources.items():
            run(4096, ["k4v2_g128"], Facts(shape, scales), lambda name, s=source: f"{name}, balance from {s}")
    else:
        prompt = torch.cat(list(texts(1024, 4).values()))
        expected = greedy.continuation(model, prompt, 128, facts)
        methods = [make(n, facts) for n in GREEDY]
        out.mkdir(parents=True, exist_ok=True)
        found = greedy.divergence(model, prompt, expected, methods)
        print(args.model, "greedy", {n: sum(x) / len(x) for n, x in found.items()}, flush=True)
        (out / f"{args.model}_greedy.json").write_text(json.dumps({"model": args.model, "prompt": 1024, "tokens": 128,
                                                                   "greedy": found}))
        run(1024, GREEDY, probe=True)


if __name__ == "__main__":
    main()
