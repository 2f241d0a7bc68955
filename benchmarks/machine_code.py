"""What ptxas makes of the kernels in their default configurations, without a GPU: results/machine_code.csv.

    python benchmarks/machine_code.py [sm_90]

Registers a thread, bytes of stack (spills), matrix instructions, instructions in all (as compiled: a loop counts once,
rare branches count too), programs that fit a processor by registers.
"""

import json
import subprocess
import sys
from pathlib import Path

import triton
from rows import RESULTS, append, commit

TESTS = Path(__file__).parents[1] / "tests" / "kernels"
NAMES = ("decode-64", "decode-128", "decode-256", "masked-128", "paged-128", "verify-128", "combine-128", "fill-64",
         "fill-128", "fill-256", "leave-128", "token-128", "pages-128", "unpack-128", "paged_unpack-128")
REGISTERS = 65536
"""Of one processor, compute capability 8.0 to 10.0."""


def main():
    target = sys.argv[1] if len(sys.argv) > 1 else "sm_90"
    run = subprocess.run([sys.executable, str(TESTS / "compiled.py"), target, *NAMES], capture_output=True, text=True,
                         check=True)
    rows = [{"kernel": name, "target": target, "warps": found["warps"], "registers": found["registers"],
             "stack": found["stack"], "matrix": found["matrix"], "instructions": found["instructions"],
             "programs_a_processor": REGISTERS // (found["registers"] * 32 * found["warps"]),
             "triton": triton.__version__, "commit": commit()} for name, found in json.loads(run.stdout).items()]
    path = RESULTS / "machine_code.csv"
    path.unlink(missing_ok=True)  # it says what the code is, not what it was
    append(path, rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
