"""Perplexity of a text under vLLM, stock and with kvarn presets, its prompts in chunks of one tile: what a token costs.

    python benchmarks/vllm/perplexity.py --model DIR_OR_HUB_ID --text FILE [--windows 3] [--tokens 1024]

Prints one line per preset and appends CSV rows to --out.
"""

import argparse
import datetime
import math
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from rows import append

PRESETS = ("k16v16", "k8v8_g128", "k4v4_g128", "k4v2_g128")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--balance", default="off", help="a file of `kvarn balance`")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    rows, kept = [], []
    reference = None
    for preset in (None, *args.presets):
        llm = engine(args, preset)
        kept.append(llm)  # the end of one engine takes the process group along
        losses, argmax = measure(llm, args)
        reference = reference or argmax
        same = sum(a == b for a, b in zip(argmax, reference, strict=True)) / len(argmax)
        rows.append({"date": datetime.date.today().isoformat(), "machine": platform.machine(), "dtype": args.dtype,
                     "model": Path(args.model).name, "text": args.text.name, "preset": preset or "stock",
                     "balance": Path(args.balance).name, "tokens": len(losses),
                     "perplexity": round(math.exp(sum(losses) / len(losses)), 3), "same_top_token": round(same, 4),
                     "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks})
        print(rows[-1], flush=True)
    if args.out:
        append(args.out, rows)


def engine(args, preset):
    """Stock vLLM, or with a preset."""
    from vllm import LLM

    own = {} if preset is None else {"attention_backend": "CUSTOM", "additional_config": {
        "kvarn": {"preset": preset, "balance": args.balance}}}
    return LLM(model=args.model, dtype=args.dtype, max_model_len=args.tokens + 16, max_num_batched_tokens=128,
               max_num_seqs=8, enforce_eager=True, enable_prefix_caching=False, kv_cache_memory_bytes=256 << 20, **own)


def measure(llm, args):
    """Negative log probability of every token of every window, and the most likely token before it."""
    from vllm import SamplingParams

    ids = llm.get_tokenizer()(args.text.read_text()[: args.windows * args.tokens * 20])["input_ids"]
    step = (len(ids) - args.tokens) // max(1, args.windows - 1)
    prompts = [{"prompt_token_ids": ids[i * step : i * step + args.tokens]} for i in range(args.windows)]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    losses, argmax = [], []
    for output in llm.generate(prompts, sampling):
        for token, options in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            losses.append(-options[token].logprob)
            argmax.append(next(t for t, option in options.items() if option.rank == 1))
    return losses, argmax


if __name__ == "__main__":
    main()
