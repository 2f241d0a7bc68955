"""Greedy tokens of a model on tensor-parallel ranks, as JSON on the last line. Run by test_processes.py.

    python two_ranks.py MODEL [RANKS]
"""

import json
import sys

from serving import engine, greedy, prompts

LENGTHS = (1, 127, 128, 129, 300)


def main():
    ranks = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    llm = engine(sys.argv[1], kv_cache_dtype="kvarn_k16v16", tensor_parallel_size=ranks, max_num_seqs=8)
    print(json.dumps(greedy(llm, prompts(*LENGTHS, seed=40), 20)))


if __name__ == "__main__":
    main()
