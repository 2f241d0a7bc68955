"""Method "raw" on a GPU: what kvarn/append.py and kvarn/attention.py do, without a host synchronization.

Plain tensor operations on whole tiles: for lossless runs, not for speed.
"""

import torch
from torch import Tensor

from kvarn.layout import StoreLayout


def append_raw(k: Tensor, v: Tensor, positions: Tensor, records: Tensor, tail: Tensor, lengths: Tensor,
               layout: StoreLayout) -> None:
    """Store k, v [B, H, n, D] at positions [B, n] in any order; records, tail and lengths hold the same B rows.

    The open tile is written back, the tokens go to the records, and the tile of the last one is read into the tail.
    """
    rows, group = torch.arange(k.shape[0], device=k.device), layout.spec.group
    opened, end = (lengths - 1).clamp_min(0) // group, positions[:, -1] // group
    used = (lengths > 0)[:, None, None, None]
    for name, x in (("k", k), ("v", v)):
        tiles, held = layout.record[name].of(records), layout.tail[name].of(tail)
        tiles[rows, :, opened] = torch.where(used, held, tiles[rows, :, opened])
        tiles[rows[:, None], :, positions // group, positions % group] = x.transpose(1, 2)
        held.copy_(tiles[rows, :, end])
    lengths.copy_(positions[:, -1] + 1)


def read_raw(records: Tensor, tail: Tensor, lengths: Tensor, layout: StoreLayout) -> tuple[Tensor, Tensor]:
    """All tokens, k and v [B, H, T * G, D] in the cache's dtype."""
    rows = torch.arange(records.shape[0], device=records.device)
    opened, sides = (lengths - 1).clamp_min(0) // layout.spec.group, []
    for name in ("k", "v"):
        tiles = layout.record[name].of(records).clone()
        tiles[rows, :, opened] = layout.tail[name].of(tail)
        sides.append(tiles.flatten(2, 3))
    return sides[0], sides[1]
