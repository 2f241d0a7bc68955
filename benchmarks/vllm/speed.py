"""Serving speed and capacity under vLLM: stock bfloat16, TurboQuant and kvarn, each in a process of its own.

    python benchmarks/vllm/speed.py [--variants bf16 kvarn_k4v2_g128 turboquant_4bit_nc=burst,short] [--parts ...]

The model has the shape of Qwen3-32B with 16 of its 64 layers and random weights (its text means nothing; what the
tokens cost does not depend on it), a pool of 14 GB, prompts of 15,872 random tokens. A variant runs the parts after its
"=", else those of --parts, in that order. Each figure is a row of vllm_speed.csv in $OUT or benchmarks/results, written
as soon as it is known: a run that is cut keeps what it has. --tiny is a model for a CPU, to see the script work.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from threading import Timer

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
VARIANTS = ("bf16", "kvarn_k4v2_g128", "turboquant_4bit_nc")
RATES = {"kv_tokens": "tokens that the pool holds", "prefill": "prompt tokens per second",
         "decode": "tokens per second, equal concurrency", "burst": "tokens per second, burst",
         "burst_long": "tokens per second, burst of long answers", "short": "tokens per second, short requests"}
"""Figures of which more is better; the other rows are seconds."""
SETTINGS = ("card", "layers", "prompt", "pool_bytes", "max_num_seqs", "batched_tokens", "eager", "cudagraph_mode")
"""Columns in which rows must agree to be compared."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=VARIANTS,
                        help="bf16 or a --kv-cache-dtype of vLLM's or ours; +fuse_rope after ours sets that option")
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batched", type=int, help="max_num_batched_tokens")
    parser.add_argument("--cudagraph-mode", help="e.g. FULL_DECODE_ONLY; vLLM's own choice if left out")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one variant")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    todo = {name: (parts or args.parts).split(",") for name, _, parts in (v.partition("=") for v in args.variants)}
    wrong = {part for parts in todo.values() for part in parts} - set(PARTS)
    if wrong:
        parser.error(f"no such parts: {', '.join(sorted(wrong))}; valid: {', '.join(PARTS)}")
    if args.child:
        measure(args, todo[args.child])
        return
    ended = [run(variant, args.timeout) for variant in todo]
    if (RESULTS / "vllm_speed.csv").exists():
        show(latest(RESULTS / "vllm_speed.csv"), todo)
    if not all(ended):
        sys.exit("not every variant came to its end")


def run(variant, seconds):
    """One variant in a process of its own, which is ended with all that it started after so many seconds; its rows are
    appended as they come. True if it came to its end; else the end of its log is printed.
    """
    begin, log = time.monotonic(), deque(maxlen=60)
    child = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--child", variant], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
    end = Timer(seconds, os.killpg, (child.pid, signal.SIGKILL))
    end.start()
    for line in child.stdout:
        log.append(line.rstrip())
        if line.startswith("ROW "):
            row = json.loads(line[4:])
            append(RESULTS / "vllm_speed.csv", [row])
            print(f"[{variant}] {row['what']} {row['value']:,} at {time.monotonic() - begin:.0f} s", flush=True)
        elif re.search(r"KV cache size:|kvarn: | backend|Graph capturing", line):
            print(f"[{variant}] {re.sub(r'^.*?[]] ', '', line.rstrip())[:220]}", flush=True)
    end.cancel()
    if child.wait() == 0:
        return True
    print(f"{variant}: ended after {time.monotonic() - begin:.0f} s", *log, sep="\n", flush=True)
    return False


def measure(args, parts):
    """Start the engine and go through the parts, a line for each figure."""
    size = dict(TINY_SIZE if args.tiny else FULL_SIZE)
    size["batched"] = args.batched or size["batched"]
    config = dict(TINY if args.tiny else QWEN3)
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        begin = time.monotonic()
        llm = engine(folder, args, size)
        start = time.monotonic() - begin
    context = where(args, config, size)

    def found(what, value):
        print("ROW " + json.dumps({"variant": args.child, "what": what, "value": value} | context), flush=True)

    cache = llm.llm_engine.vllm_config.cache_config
    found("start_s", round(start, 1))
    found("kv_tokens", cache.num_gpu_blocks * cache.block_size)
    found("kv_tokens_at_max_len", cache.kv_cache_size_tokens)
    client = Client(llm, config["vocab_size"])
    for what in ("first_request_s", "second_request_s"):
        found(what, round(client.serve([size["prompt"] // 8], 1)["seconds"], 4))
    for part in parts:
        found(part, round(rate(part, client, size), 1))
    llm.llm_engine.engine_core.shutdown()


def engine(folder, args, size):
    from vllm import LLM

    name, _, option = args.child.partition("+")
    own = {} if name == "bf16" else {"kv_cache_dtype": name}
    if option:
        own["additional_config"] = {"kvarn": {option: True}}
    if args.cudagraph_mode:
        own["compilation_config"] = {"cudagraph_mode": args.cudagraph_mode}
    return LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_num_seqs=size["seqs"],
               max_model_len=-(-(size["prompt"] + size["long_out"]) // 128) * 128, enforce_eager=args.eager,
               max_num_batched_tokens=size["batched"], kv_cache_memory_bytes=size["pool"], enable_prefix_caching=False,
               **own)


def rate(part, client, size):
    """Tokens per second of one part."""
    if part == "prefill":
        return size["prefill"] * size["prompt"] / client.serve([size["prompt"]] * size["prefill"], 1)["seconds"]
    if part == "decode":
        return client.serve([size["prompt"]] * size["equal"], size["out"])["decode"]
    if part == "short":
        count, prompt, out = size["short"]
        return client.serve([prompt] * count, out)["rate"]
    return client.serve([size["prompt"]] * size["burst"], size["out" if part == "burst" else "long_out"])["rate"]


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


def latest(path):
    """The newest row of each variant's each figure, {variant: {what: row}}, on the card and with the settings of bf16's
    last row, if it has any, else of the last. A row's "times" is its value over bf16's of the same commit, None if that
    was not measured: commits are measured on different machines.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    base = ([row for row in rows if row["variant"] == "bf16"] or rows)[-1]
    found, stock = {}, {}
    for row in rows:
        if all(row[name] == base[name] for name in SETTINGS):
            found.setdefault(row["variant"], {})[row["what"]] = row
            if row["variant"] == "bf16":
                stock[row["commit"], row["what"]] = float(row["value"])
    for figures in found.values():
        for what, row in figures.items():
            beside = stock.get((row["commit"], what))
            row["times"] = float(row["value"]) / beside if beside else None
    return found


def show(found, variants):
    """One line per variant; in brackets the ratio to bf16."""
    for variant in variants:
        cells = [f"{variant:<20}"]
        for what, row in found.get(variant, {}).items():
            ratio = f" ({row['times']:.2f}x)" if row["times"] else ""
            cells.append(f"{what} {float(row['value']):,}{ratio}")
        print("  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
