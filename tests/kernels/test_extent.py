"""Which part of the cache a mask lets the queries of a KV head see."""

import pytest
import torch
from stores import DEVICE

from kvarn.kernels import extent

LEAST = torch.finfo(torch.float32).min


def found(mask, rows, heads, group, n, length):
    mask = mask.to(DEVICE).expand(rows, heads * group, n, length)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    out = torch.full((rows, heads, 4), -1, dtype=torch.int32, device=DEVICE)
    extent.extent(mask, out)
    return out[..., :3].tolist()


def wanted(mask, rows, heads, group, n, length):
    """The same, position by position."""
    mask = mask.expand(rows, heads * group, n, length).unflatten(1, (heads, group))
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    plain = mask if mask.dtype == torch.bool else mask == 0
    rows_differ = mask[:, :, :1, :1].expand_as(mask).ne(mask).any()
    lists = []
    for row in range(rows):
        lists.append([])
        for head in range(heads):
            at = seen[row, head].flatten(0, 1).any(0).nonzero()
            if not seen[row, head].any(-1).all():
                lists[-1].append([0, length, 1])
                continue
            first, last = int(at[0]), int(at[-1]) + 1
            all_plain = bool(plain[row, head, 0, 0, first:last].all()) and not rows_differ
            lists[-1].append([first, last, 0 if all_plain else 1])
    return lists


def staircase(n, length, offset):
    return (torch.arange(length) <= offset + torch.arange(n)[:, None])[None, None]


RANDOM = torch.Generator().manual_seed(0)
CASES = {  # mask, rows, KV heads, group, n, length
    "one token": (staircase(1, 20000, 17000), 1, 3, 5, 1, 20000),
    "odd length": (staircase(1, 333, 200), 2, 2, 4, 1, 333),
    "window": (staircase(1, 600, 400) & (torch.arange(600) > 300), 1, 2, 8, 1, 600),
    "holes": (torch.rand(2, 1, 1, 500, generator=RANDOM) < 0.3, 2, 2, 3, 1, 500),
    "one per head": (torch.rand(1, 6, 1, 500, generator=RANDOM) < 0.01, 1, 2, 3, 1, 500),
    "additive": (torch.zeros(1, 1, 1, 700).masked_fill(~staircase(1, 700, 511), LEAST), 1, 2, 3, 1, 700),
    "half": (torch.zeros(2, 1, 1, 70).half().masked_fill(torch.arange(70) < 9, -65504.0), 2, 1, 3, 1, 70),
    "bias": (torch.randn(1, 6, 1, 70, generator=RANDOM), 1, 2, 3, 1, 70),
    "sees nothing": (torch.zeros(1, 1, 1, 300, dtype=torch.bool), 1, 2, 3, 1, 300),
    "several tokens": (staircase(5, 9000, 8700), 1, 2, 3, 5, 9000),
    "many tokens": (staircase(19, 500, 300), 2, 2, 1, 19, 500),
    "tokens and heads": (torch.rand(2, 6, 5, 300, generator=RANDOM) < 0.02, 2, 2, 3, 5, 300),
    "one token sees nothing": (staircase(5, 300, 100) & (torch.arange(5) != 3)[:, None], 1, 2, 3, 5, 300),
    "tokens alike": (torch.arange(300)[None, None, None] > 7, 1, 2, 3, 5, 300),
}


@pytest.mark.parametrize("name", CASES)
def test_extent(name):
    assert found(*CASES[name]) == wanted(*CASES[name])
