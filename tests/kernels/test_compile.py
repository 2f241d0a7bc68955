"""Default configurations compile for every supported GPU, keep everything in registers, use the matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {"sm_80": ["decode-128", "masked-128"], "sm_100": ["decode-128", "masked-128"],
         "sm_90": ["close-128", "close-64", "write-128", "unpack-128", "prepare-128", "combine-128", "decode-128",
                   "masked-128", "decode-64", "masked-64"]}
WITHOUT_MATRICES = ("combine",)
STACK = {("sm_90", "masked-128"): 8, ("sm_100", "masked-128"): 8, ("sm_100", "decode-128"): 16}
"""Bytes of stack of the kernels that put a register pair or two aside, outside the loop over tiles; of others none."""


@pytest.mark.parametrize("target", CASES)
def test_no_spills(target):
    pytest.importorskip("triton")
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parents[1]), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(here / "compiled.py"), target, *CASES[target]], capture_output=True,
                         text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    for name, found in json.loads(run.stdout).items():
        assert found["stack"] <= STACK.get((target, name), 0), (name, found)
        assert (found["matrix"] > 0) != name.startswith(WITHOUT_MATRICES), (name, found)
