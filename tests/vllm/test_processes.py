"""The engine, its scheduler and two tensor-parallel ranks in processes of their own: the spec travels by pickle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
from serving import greedy, prompts
from two_ranks import LENGTHS


def test_two_ranks_give_stock_tokens(llama, stock):
    script = Path(__file__).with_name("two_ranks.py")
    run = subprocess.run([sys.executable, str(script), str(llama)], capture_output=True, text=True, timeout=240,
                         env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("[[")]
    assert json.loads(lines[-1]) == greedy(stock, prompts(*LENGTHS, seed=40), 20)
