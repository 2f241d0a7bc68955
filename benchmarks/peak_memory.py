"""Peak resident memory of a long run with a plain StaticCache and with kvarn's cache that is never plain.

    python benchmarks/peak_memory.py [--tokens 16384] [--layers 8]

A transformers Llama with random weights reads a prompt in chunks and generates a few tokens, each variant in a process
of its own: "none" (a cache of one chunk: what the model and the chunks take), "plain" and "kvarn". It first checks, on
a short prompt, that the lossless preset gives the plain model's tokens. A row goes to results/peak_memory.csv.
"""

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys

import torch
from rows import RESULTS, append

CHUNK, NEW = 256, 8


def run(variant, tokens, layers):
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    import kvarn_compile.hf

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=layers,
                         num_attention_heads=8, num_key_value_heads=8, head_dim=128, max_position_embeddings=tokens)
    model = LlamaForCausalLM(config).eval()
    if variant in ("kvarn", "lossless"):
        preset = "k4v2_g128" if variant == "kvarn" else "k16v16"
        cache = kvarn_compile.hf.empty_static_cache(config, 1, tokens, torch.float32)
        call = torch.compile(model, backend="kvarn", options={"preset": preset, "inner": "eager"})
    else:
        cache = StaticCache(config=config, max_cache_len=tokens)
        call = torch.compile(model, backend="eager")  # so that the compiler's own memory is in both
    ids = torch.randint(0, 256, (1, tokens - NEW), generator=torch.Generator().manual_seed(1))
    generated = []
    with torch.no_grad():
        for piece in ids.split(CHUNK, 1):
            logits = call(piece, cache=cache, logits_to_keep=1).logits
        for _ in range(NEW):
            generated.append(int(logits[0, -1].argmax()))
            logits = call(torch.tensor([[generated[-1]]]), cache=cache).logits
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "tokens": generated}


def measured(variant, tokens, layers):
    command = [sys.executable, __file__, "--variant", variant, "--tokens", str(tokens), "--layers", str(layers)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--variant", choices=["plain", "kvarn", "lossless"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run(args.variant, args.tokens, args.layers)))
        return
    short = {variant: measured(variant, 512, args.layers)["tokens"] for variant in ("plain", "lossless")}
    if short["plain"] != short["lossless"]:
        sys.exit(f"the lossless preset does not give the plain model's tokens: {short}")
    none, plain, packed = (measured(variant, tokens, args.layers)["peak_bytes"] for variant, tokens in
                           (("plain", CHUNK + NEW), ("plain", args.tokens), ("kvarn", args.tokens)))
    cache = args.layers * 2 * 8 * args.tokens * 128 * 4
    row = {"date": datetime.date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__,
           "tokens": args.tokens, "layers": args.layers, "plain_cache_bytes": cache, "peak_no_cache": none,
           "peak_plain": plain, "peak_kvarn": packed, "saved_of_cache": round((plain - packed) / cache, 3)}
    append(RESULTS / "peak_memory.csv", [row])
    for name, value in row.items():
        print(f"{name:18} {value:,}" if isinstance(value, int) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
