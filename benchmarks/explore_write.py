"""Rounding whole tiles over a grid of launch configurations: where configs.fill and configs.leave come from."""

import sys

import torch
from common import copy_bandwidth, show, write_rows
from write import chunk, paged_token

from kvarn.kernels import configs

FILL = {128: [(4, 168), (4, None), (8, 128)], 64: [(2, None), (4, None), (4, 128)], 256: [(8, None), (16, 128)]}
"""Warps and register limits by head_dim; the first is the default."""

LEAVE = (8, 4, 16)
"""Warps of the programs that close paged tiles, likewise, at head_dim 128."""


def main():
    bandwidth, rows = copy_bandwidth(), []
    print(torch.cuda.get_device_name(), "copy GB/s", bandwidth, flush=True)
    runs = [("fill", dim, config) for dim, grid in FILL.items() for config in grid]
    for name, dim, config in runs[:3] + [("leave", 128, warps) for warps in LEAVE] + runs[3:]:
        default = getattr(configs, name)
        setattr(configs, name, lambda *_, config=config: config)
        try:
            rows.append(chunk(dim, bandwidth) if name == "fill" else paged_token(dim, length=1024))
            show(rows[-1])
        except (RuntimeError, AssertionError) as problem:
            print(name, config, "failed:", str(problem)[:100], flush=True)
        setattr(configs, name, default)
    write_rows("explore_write", rows)


if __name__ == "__main__":
    sys.exit(main())
