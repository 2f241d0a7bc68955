"""Default configurations compile for every supported GPU, keep everything in registers, use the matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {"sm_80": ["fill-128", "pages-128", "decode-128", "masked-128", "paged-128", "chunk-128"],
         "sm_100": ["fill-128", "pages-128", "decode-128", "masked-128", "paged-128", "chunk-128"],
         "sm_90": ["fill-128", "fill-64", "fill-256", "pages-128", "rope_pages-128", "rope_heads-128",
                   "write-128", "raw_write-128", "unpack-128", "paged_unpack-128", "combine-128",
                   "combine_some-128", "combine_few-128", "combine_few-256",
                   "decode-128", "masked-128", "paged-128", "verify-128", "softcap-128", "decode_exact-128",
                   "decode-64",
                   "masked-64", "paged-64", "decode-256",
                   "chunk-64", "chunk-128", "chunk_bias-128", "chunk_turns-128", "chunk-256",
                   "sights1-128", "sights4-128", "lists-128", "extent1-128", "extent2-128", "extent4-128"]}
TAKE_CODES = ("decode", "masked", "paged-", "verify", "softcap")
"""Kernels whose codes must be operands of the older matrix instructions (configs.decode)."""
SEAMS = 64
"""Bytes of stack that these may keep while they are not in a loop over tiles: with as many registers as they want,
fewer programs fit a processor, and that is slower (docs/kernels.md)."""
WITHOUT_MATRICES = ("extent", "raw", "rope_heads", "sights", "lists")
STACK = {("sm_80", "fill-128"): 392, ("sm_80", "pages-128"): 240, ("sm_90", "fill-128"): 472,
         ("sm_90", "fill-256"): 280, ("sm_90", "pages-128"): 120, ("sm_90", "chunk-256"): 112,
         ("sm_100", "chunk-128"): 48, ("sm_100", "fill-128"): 704, ("sm_100", "pages-128"): 384}
"""Bytes of stack, the greater of Triton 3.6's and 3.7's: of the programs that round tiles, of which more fit a
processor that way (configs.fill) and which keep a whole tile in registers; of a chunk's seams between loops, at
head_dim 256 and on sm_100."""
LOOPED = {"sm_100": 8}
"""Instructions in a loop over tiles that reach for the stack, where no such GPU was there to measure registers on."""


@pytest.mark.parametrize("target", CASES)
def test_no_spills(target):
    pytest.importorskip("triton")
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parents[1]), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(here / "compiled.py"), target, *CASES[target]], capture_output=True,
                         text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout)
    for name, found in report.items():
        seams = SEAMS if name.startswith(TAKE_CODES) else 0
        limit = STACK.get((target, name), seams)
        if name.startswith("rope_pages"):
            limit = report[name.removeprefix("rope_")]["stack"]  # it calls append_pages and spills nothing of its own
        assert found["stack"] <= limit, (name, found)
        assert not (seams or name.startswith("chunk")) or found["looped"] <= LOOPED.get(target, 0), (name, found)
        assert (found["matrix"] + found["groups"] > 0) != name.startswith(WITHOUT_MATRICES), (name, found)
        assert not (found["groups"] and name.startswith(TAKE_CODES)), (name, found)
