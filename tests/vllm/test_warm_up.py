"""Every kernel that serving launches is compiled at start-up (kvarn_compile/vllm/warmup.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module")
def kernels(llama):
    """In a process of its own: the tests' Triton interprets kernels, which has no keys."""
    script = Path(__file__).with_name("late_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script), str(llama)], capture_output=True, text=True, timeout=240,
                         env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_steps_find_their_kernels(kernels):
    """Random mixes of decodes and prompts, with and without history, at any place of vLLM's tensors."""
    assert not any(found["late"] for found in kernels.values()), kernels


def test_the_warm_up_compiles_them(kernels):
    packed = {"append_pages", "fill_blocks", "decode_tiles", "combine_parts", "unpack_blocks"}
    for name, found in kernels.items():
        assert set(found["warm"]) == ({"close_raw", "write_raw", "read_raw"} if name.startswith("k16v16") else packed)


def test_another_kernel_would_be_seen(kernels):
    """The negative control: rows of three tokens in an engine without drafts."""
    assert all("decode_tiles" in found["other"] for name, found in kernels.items() if not name.startswith("k16v16"))
