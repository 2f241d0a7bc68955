"""Serving speed and capacity under vLLM: stock bfloat16, TurboQuant and kvarn, each in a process of its own.

    python benchmarks/vllm/speed.py [--variants bf16 turboquant_4bit_nc kvarn_k4v2_g128] [--parts ...] [--tiny]

The model has the shape of Qwen3-32B with 16 of its 64 layers and random weights (its text means nothing; what the
tokens cost does not depend on it), a pool of 14 GB, prompts of 15,872 random tokens. One row per variant goes to
vllm_speed.csv in $OUT or benchmarks/results. --tiny is a model for a CPU, to see the script work.
"""

import argparse
import datetime
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from rows import RESULTS, append, commit

QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600,
         "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 16,
         "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
         "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16",
         "bos_token_id": 1, "eos_token_id": 2}
TINY = QWEN3 | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
                "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 64}
FULL_SIZE = {"prompt": 15872, "pool": 14_000_000_000, "seqs": 64, "batched": 8192, "burst": 48, "out": 256,
             "long_out": 1024, "equal": 12, "short": (256, 128, 128), "prefill": 8}
TINY_SIZE = {"prompt": 300, "pool": 4 << 20, "seqs": 8, "batched": 512, "burst": 12, "out": 8, "long_out": 16,
             "equal": 4, "short": (16, 16, 8), "prefill": 4}
PARTS = ("prefill", "decode", "burst", "short", "burst_long")
VARIANTS = ("bf16", "turboquant_4bit_nc", "kvarn_k4v2_g128")
RATES = ("kv_tokens", "prefill_tok_s", "decode_tok_s", "burst_tok_s", "burst_long_tok_s", "short_tok_s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="bf16 or a --kv-cache-dtype of vLLM's or ours")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:4])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batched", type=int, help="max_num_batched_tokens")
    parser.add_argument("--cudagraph-mode", help="e.g. FULL_DECODE_ONLY; vLLM's own choice if left out")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one variant")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("ROW " + json.dumps(measure(args)), flush=True)
        return
    rows = [row for variant in args.variants if (row := run(variant, args))]
    if rows:
        append(RESULTS / "vllm_speed.csv", rows)
        show(rows)
    if len(rows) < len(args.variants):
        sys.exit("not every variant came to its end")


def run(variant, args):
    """One variant in a process of its own; its row, or None with the end of its log printed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", variant]
    with tempfile.TemporaryFile("w+") as log:
        begin = time.monotonic()
        try:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=args.timeout, check=False)
        except subprocess.TimeoutExpired:
            print(f"{variant}: more than {args.timeout} s", flush=True)
        log.seek(0)
        lines = log.read().splitlines()
    for line in lines:
        if re.search(r"^PART |KV cache size:|kvarn: | backend|capturing|Graph capturing", line):
            print(f"[{variant}] {re.sub(r'^.*?[]] ', '', line)[:220]}", flush=True)
    row = next((json.loads(line[4:]) for line in lines if line.startswith("ROW ")), None)
    if row is None:
        print("\n".join(lines[-60:]), flush=True)
        return None
    return row | {"wall_s": round(time.monotonic() - begin, 1)}


def measure(args):
    """Start the engine and go through the parts."""
    size = dict(TINY_SIZE if args.tiny else FULL_SIZE)
    size["batched"] = args.batched or size["batched"]
    config = dict(TINY if args.tiny else QWEN3)
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        begin = time.monotonic()
        llm = engine(folder, args, size)
        row = {"variant": args.child, "start_s": round(time.monotonic() - begin, 1)}
    cache = llm.llm_engine.vllm_config.cache_config
    row |= {"kv_tokens": cache.num_gpu_blocks * cache.block_size, "kv_tokens_at_max_len": cache.kv_cache_size_tokens,
            "blocks": cache.num_gpu_blocks, "block_size": cache.block_size}
    client = Client(llm, config["vocab_size"])
    first, second = (client.serve([size["prompt"] // 8], 1)["seconds"] for _ in range(2))
    row |= {"first_request_ms": round(first * 1e3, 1), "second_request_ms": round(second * 1e3, 1)}
    for part in PARTS:
        for name in columns(part):
            row[name] = ""
        if part in args.parts:
            row |= rates(part, client, size)
            print("PART " + json.dumps({name: row[name] for name in columns(part)}), flush=True)
    llm.llm_engine.engine_core.shutdown()
    return row | where(args, config, size)


def engine(folder, args, size):
    from vllm import LLM

    own = {} if args.child == "bf16" else {"kv_cache_dtype": args.child}
    if args.cudagraph_mode:
        own["compilation_config"] = {"cudagraph_mode": args.cudagraph_mode}
    return LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_num_seqs=size["seqs"],
               max_model_len=-(-(size["prompt"] + size["long_out"]) // 128) * 128, enforce_eager=args.eager,
               max_num_batched_tokens=size["batched"], kv_cache_memory_bytes=size["pool"], enable_prefix_caching=False,
               **own)


def columns(part):
    return {"burst": ("burst_tok_s", "burst_s"), "burst_long": ("burst_long_tok_s", "burst_long_s")}.get(
        part, (f"{part}_tok_s",))


def rates(part, client, size):
    """The columns of one part."""
    if part == "prefill":
        count = size["prefill"]
        return {"prefill_tok_s": round(count * size["prompt"] / client.serve([size["prompt"]] * count, 1)["seconds"])}
    if part == "decode":
        return {"decode_tok_s": round(client.serve([size["prompt"]] * size["equal"], size["out"])["decode"], 1)}
    if part == "short":
        count, prompt, out = size["short"]
        return {"short_tok_s": round(client.serve([prompt] * count, out)["rate"], 1)}
    out = size["out" if part == "burst" else "long_out"]
    served = client.serve([size["prompt"]] * size["burst"], out)
    return {f"{part}_tok_s": round(served["rate"], 1), f"{part}_s": round(served["seconds"], 1)}


class Client:
    """Requests of random tokens through the engine's own loop, with the time at which tokens arrive."""

    def __init__(self, llm, vocabulary):
        self.engine, self.vocabulary, self.random, self.served = llm.llm_engine, vocabulary, random.Random(0), 0

    def serve(self, prompts, out):
        """Prompts of these lengths, `out` tokens each.

        seconds: from the first request to the last token. rate: tokens out per second of that time. decode: tokens per
        second from when every request has its first token until the first request has its last.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True, detokenize=False)
        texts = [[self.random.randrange(3, self.vocabulary) for _ in range(length)] for length in prompts]
        begin = time.perf_counter()
        for tokens in texts:
            self.served += 1
            self.engine.add_request(str(self.served), {"prompt_token_ids": tokens}, sampling)
        have, marks = {}, []
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                have[output.request_id] = len(output.outputs[0].token_ids)
            if len(have) == len(prompts) and max(have.values()) < out:
                marks.append((time.perf_counter(), sum(have.values())))
        seconds = time.perf_counter() - begin
        assert sum(have.values()) == out * len(prompts), "tokens are missing"
        decode = 0.0
        if len(marks) > 1:
            (start, before), (end, after) = marks[0], marks[-1]
            decode = (after - before) / (end - start)
        return {"seconds": seconds, "rate": out * len(prompts) / seconds, "decode": decode}


def where(args, config, size):
    """What the figures depend on."""
    import torch
    import vllm

    card = platform.machine()
    if torch.version.cuda:  # asked of the driver: a CUDA context of this process would count as used memory
        card = subprocess.check_output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], text=True)
        card = card.splitlines()[0]
    return {"layers": config["num_hidden_layers"], "prompt": size["prompt"], "pool_bytes": size["pool"],
            "max_num_seqs": size["seqs"], "batched_tokens": size["batched"], "eager": args.eager,
            "cudagraph_mode": args.cudagraph_mode or "", "card": card, "vllm": vllm.__version__,
            "torch": torch.__version__, "date": datetime.date.today().isoformat(), "commit": commit()}


def show(rows):
    """One line per variant; in brackets the ratio to the first."""
    for row in rows:
        cells = [f"{row['variant']:<20}"]
        for name in RATES:
            if row[name] != "":
                cells.append(f"{name} {row[name]:,} ({row[name] / rows[0][name]:.2f}x)")
        cells.append(f"first/second request {row['first_request_ms']}/{row['second_request_ms']} ms")
        cells.append(f"start {row['start_s']} s, all {row['wall_s']} s")
        print("  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
