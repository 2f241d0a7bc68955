"""What a kernel's warps wait for, and its traffic by kind, from Nsight Compute's view of each instruction.

    python benchmarks/stalls.py fill                profiles the workload (counters.py) and adds its row
    python benchmarks/stalls.py fill --saved FILE --card NAME --torch V --triton V --date D --commit C

Row of results/stalls.csv. A saved view is `ncu --csv --page source` of section SourceCounters, and the rest says where
and of what it was taken.
"""

import argparse
import csv
import gzip
import io
import subprocess
import sys
from pathlib import Path

from rows import RESULTS, append

STALLS = {"memory_pct": "stall_long_sb", "shared_pct": "stall_short_sb", "fixed_pct": "stall_wait",
          "issued_pct": "stall_selected", "barrier_pct": "stall_barrier", "not_chosen_pct": "stall_not_selected",
          "queue_pct": "stall_mio"}
"""Column -> stall: the share of the samples of all warps."""
SUMS = {"instructions": "Instructions Executed", "global_sectors": "L2 Theoretical Sectors Global",
        "spill_sectors": "L2 Theoretical Sectors Local", "shared_wavefronts": "L1 Wavefronts Shared",
        "shared_ideal": "L1 Wavefronts Shared Ideal"}
"""Column -> metric, summed over the instructions. Sectors are of 32 bytes, as if no cache held any."""


def profiled(name: str) -> str:
    """The view of one launch of a workload of counters.py.

    Raises:
        ValueError: if there is no such workload.
    """
    from counters import WORKLOADS

    if name not in WORKLOADS:
        raise ValueError(f"workload {name!r}; valid: {', '.join(WORKLOADS)}")
    child = [sys.executable, str(Path(__file__).with_name("counters.py")), name]
    command = ["ncu", "--csv", "--page", "source", "--clock-control", "none", "--section", "SourceCounters", "-k",
               f"regex:{WORKLOADS[name][0]}", "-s", "2", "-c", "1", *child]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=180).stdout


def saved(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()


def summed(view: str) -> dict[str, float]:
    """The columns of STALLS and SUMS.

    Raises:
        ValueError: if the text has no table of instructions.
    """
    start = view.find('"Address"')
    lines = list(csv.DictReader(io.StringIO(view[start:]))) if start >= 0 else []
    if not lines:
        raise ValueError("no instruction below a line that begins with \"Address\"; valid: the output of ncu --csv "
                         "--page source")

    def total(column: str) -> float:
        if column == SUMS["spill_sectors"] and column not in lines[0]:
            return 0.0  # what Nsight Compute leaves out if nothing is spilled
        return sum(float(line[column] or 0) for line in lines)

    samples = total("# Samples")
    return ({column: 100 * total(stall) / samples for column, stall in STALLS.items()}
            | {column: total(metric) for column, metric in SUMS.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload")
    parser.add_argument("--saved", type=Path)
    told = ("card", "torch", "triton", "date", "commit")
    for name in told:
        parser.add_argument(f"--{name}")
    args = parser.parse_args()
    if args.saved is None:
        from common import where

        view, here = profiled(args.workload), where()
    else:
        view, here = saved(args.saved), {name: getattr(args, name) for name in told}
    if None in here.values():
        parser.error("--saved needs --card, --torch, --triton, --date and --commit: where and of what it was taken")
    found = summed(view)
    append(RESULTS / "stalls.csv", [{"workload": args.workload, **found, **here}])
    print(found)


if __name__ == "__main__":
    main()
