"""Rounding whole tiles over a grid of launch configurations: where configs.fill comes from."""

import sys

import torch
from common import copy_bandwidth, show, write_rows
from write import chunk

from kvarn.kernels import configs

GRID = {128: [(4, None), (8, 128), (8, None), (4, 168)], 64: [(4, None), (4, 128), (2, None)],
        256: [(8, None), (4, None)]}


def main():
    bandwidth, rows = copy_bandwidth(), []
    print(torch.cuda.get_device_name(), "copy GB/s", bandwidth, flush=True)
    for dim, grid in GRID.items():
        for config in grid:
            configs.fill = lambda *_, config=config: config
            try:
                rows.append(chunk(dim, bandwidth))
            except (RuntimeError, AssertionError) as problem:
                print(dim, config, "failed:", str(problem)[:100], flush=True)
                continue
            show(rows[-1])
    write_rows("explore_write", rows)


if __name__ == "__main__":
    sys.exit(main())
