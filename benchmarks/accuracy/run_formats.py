"""Which record: every open question of the format as a keys-only, values-only or whole run per variant.

    python run_formats.py PIECES OUT MODEL... [--context 2048] [--device cuda]

Predictions are in PREDICTIONS.md, written before the first run.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from balances import all_sources
from carried import load
from variants import Variant, question

from kvarn_compile.eval import harness
from kvarn_compile.eval.hf import model_shape
from kvarn_compile.eval.methods import make
from kvarn_compile.eval.methods.base import Facts

BALANCES = ["none", "weights", "weights_qk", "random", "random_seed1", "random_seed2", "random_256", "random_p1/8",
            "random_p3/8", "random_clamp2", "random_clamp4", "random_floor1e-2", "random_floor1e-1", "text",
            "text_clamp4", "text_p1/8"]
KEYS = {f"balance={name}": question(balance=name) for name in BALANCES} | {
    "no rotation, balance=none": question(balance="none", rotate_keys=False),
    "ks fp16": question(ks="fp16"), "kt e4m3": question(kt="e4m3"), "k tile 64": question(k_group=64),
    "exact K rows 1": question(exact_keys=True), "exact K rows 2": question(exact_keys=True, exact_rows=2),
    "sink 4": question(sink=4), "k3": question(k_bits=3), "k3 weights_qk": question(k_bits=3, balance="weights_qk"),
    "k3 ks fp16": question(k_bits=3, ks="fp16"), "k3 tile 64": question(k_bits=3, k_group=64)}
VALUES = {
    "base": question(), "exact 0": question(exact_rows=0), "exact 2": question(exact_rows=2),
    "exact 4": question(exact_rows=4), "exact 1 int8": question(exact="int8"),
    "exact 2 int8": question(exact="int8", exact_rows=2), "exact 4 int8": question(exact="int8", exact_rows=4),
    "sink 4, exact 0": question(exact_rows=0, sink=4), "sink 4, exact 1": question(sink=4),
    "sink 128, exact 0": question(exact_rows=0, sink=128), "sink 128, exact 1": question(sink=128),
    "power 1": question(power=1), "power 2": question(power=2),
    "no direction": question(directions=0), "2 directions": question(directions=2, power=2),
    "2 directions, int8": question(directions=2, power=2, exact="int8"),
    "channel scale": question(vs=True), "gain mse": question(gain="mse"), "gain norm": question(gain="norm"),
    "step 0.9": question(step=0.9), "step 1.1": question(step=1.1), "vt fp16": question(vt="fp16"),
    "tile 64": question(v_group=64), "v3": question(v_bits=3), "v3 vt fp16": question(v_bits=3, vt="fp16"),
    "v3 power 2": question(v_bits=3, power=2), "v4": question(v_bits=4), "v4 vt fp16": question(v_bits=4, vt="fp16"),
    "v4 gain mse": question(v_bits=4, gain="mse"), "v4 plain": question(v_bits=4, v_plain=True),
    "v4 exact 0": question(v_bits=4, exact_rows=0, vt="fp16"),
    "v4 no direction": question(v_bits=4, directions=0, vt="fp16")}
WHOLE = {
    "k4v4": question(v_bits=4, vt="fp16"), "k4v4 ks fp16": question(v_bits=4, vt="fp16", ks="fp16"),
    "k4v4 exact K row": question(v_bits=4, vt="fp16", exact_keys=True),
    "k4v4 exact K row, ks fp16": question(v_bits=4, vt="fp16", exact_keys=True, ks="fp16"),
    "k4v4 sink 4": question(v_bits=4, vt="fp16", sink=4),
    "k4v2 exact K row": question(exact_keys=True), "k4v2 exact K row int8": question(exact_keys=True, exact="int8"),
    "k4v2 power 2, 2 int8 rows": question(power=2, exact="int8", exact_rows=2),
    "k4v2 power 2, ks fp16, int8 row": question(power=2, ks="fp16", exact="int8"), "k4v2 base": question()}
PRODUCT = ["k4v2_g128", "k4v2_g128+fp16tail", "k4v2_g128+tailread", "k4v2_g128+unbalanced", "k4v4_g128",
           "k4v4_g128+fp16tail", "k4v4_g128+tailread", "k8v8_g128", "upstream_k4v2_g128", "upstream_k4v2_g128+nosink",
           "upstream_k4v4_g128", "upstream_k4v4_g128+nosink",
           "kivi_k4v2", "kivi_k2v2", "turboquant_k8v4", "turboquant_4bit_nc",
           "turboquant_k3v4_nc", "turboquant_3bit_nc", "int4_per_token", "fp8_e4m3", "quarot_k4v2", "quarot_k4v4"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tables", default="k,v,kv,product")
    parser.add_argument("--limit", type=int, default=1000)
    args = parser.parse_args()
    for name in args.models:
        began = time.time()
        model, windows = load(args.pieces, name, args.device)
        ids = torch.cat([windows[f"{text}_4096"][: args.windows, : args.context] for text in ("wiki", "novels")])
        ids = ids.to(args.device)
        balances = all_sources(model, args.device, windows["handbook_4096"][1:2, :2048].to(args.device))
        facts = Facts(model_shape(model), balances["random"])
        product = Facts(model_shape(model), balances["product"])
        print(name, facts.shape, f"loaded {time.time() - began:.0f} s", flush=True)
        results = {"model": name, "shape": vars(facts.shape), "windows": list(ids.shape), "torch": torch.__version__,
                   "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
        for sides, table in (("k", KEYS), ("v", VALUES), ("kv", WHOLE), ("kv", PRODUCT)):
            if ("product" if table is PRODUCT else sides if table is not WHOLE else "kv") not in args.tables.split(","):
                continue
            if table is PRODUCT:
                methods, label = [make(m, product) for m in PRODUCT], "product"
            else:
                methods, label = [Variant(n, facts, f, balances) for n, f in table.items()], sides
            done = results.setdefault(label, {})
            for first in range(0, min(len(methods), args.limit), 12):
                done |= harness.evaluate(model, ids, methods[first : first + 12][: args.limit], sides=sides)
                (args.out / f"formats_{name}_{args.tables}.json").write_text(json.dumps(results))
            print(label, f"{time.time() - began:.0f} s", {n: f"{r['kl']:.5f}" for n, r in done.items()}, flush=True)
        del model


if __name__ == "__main__":
    main()
