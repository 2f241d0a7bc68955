"""A few query tokens per row of a contiguous store, as a speculative decoder verifies them: read from packed tiles."""

import pytest
import torch
from stores import error, expected, read, tokens, twins, write

from kvarn import cuda
from kvarn.decode_cuda import decode_limit

CAPACITY, DIM = 300, 64


def step(n, group, starts, heads=2, dtype=torch.float32):
    """A store after 150 tokens and n more from starts[row] on; the n and their positions, their queries, a mask."""
    rows = len(starts)
    _, gpu = twins("k4v2_g64", rows, heads, CAPACITY, DIM, dtype)
    write(None, gpu, *tokens(rows, heads, 150, DIM, dtype, 0), torch.arange(150))
    k, v = tokens(rows, heads, n, DIM, dtype, 1)
    at = torch.tensor(starts)[:, None] + torch.arange(n)
    write(None, gpu, k, v, at)
    q = torch.randn(rows, heads * group, n, DIM, generator=torch.Generator().manual_seed(2)).to(dtype)
    return gpu, (q, k, v, at), (torch.arange(CAPACITY) <= at[..., None])[:, None]


@pytest.mark.parametrize("n, group", [(2, 1), (5, 4), (3, 5), (8, 8), (64, 1)])
@pytest.mark.parametrize("starts", [(150, 20), (189, 127)], ids=["inside a tile", "across tiles"])
def test_several_tokens_read_what_is_stored(n, group, starts):
    gpu, own, mask = step(n, group, starts)
    out = read(gpu, *own, mask, CAPACITY)
    assert error(out, expected(gpu, own[0], mask, CAPACITY)) < 3e-3


def test_one_more_token_is_a_chunk_and_reads_its_own_as_they_are():
    group = 8
    for n, stored in ((decode_limit(group), True), (decode_limit(group) + 1, False)):
        gpu, own, mask = step(n, group, (186, 186))
        out = read(gpu, *own, mask, CAPACITY)
        as_stored, as_given = (expected(gpu, own[0], mask, CAPACITY, given) for given in (None, own[1:]))
        assert error(as_stored, as_given) > 0.02
        assert error(out, as_stored if stored else as_given) < 3e-3


@pytest.mark.parametrize("kind", ["window", "additive", "one per head", "one sees nothing", "none"])
def test_masks(kind):
    gpu, own, mask = step(4, 3, (150, 70))
    if kind == "window":
        mask = mask & (torch.arange(CAPACITY) > own[3][..., None] - 50)[:, None]
    elif kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    elif kind == "one per head":
        mask = mask & (torch.rand(1, 6, 1, CAPACITY, generator=torch.Generator().manual_seed(4)) < 0.7)
    elif kind == "one sees nothing":
        mask = mask.clone()
        mask[1, :, 2] = False
    out = read(gpu, *own, None if kind == "none" else mask, CAPACITY)
    assert error(out, expected(gpu, own[0], None if kind == "none" else mask, CAPACITY)) < 3e-3
    assert kind != "one sees nothing" or not out[1, :, 2].any()


def test_causal_attention_without_a_mask_is_a_chunk(monkeypatch):
    """Its keys are the first ones, whatever else the store holds."""
    monkeypatch.setattr(cuda, "decode_store", None)
    gpu, own, _ = step(4, 2, (0, 0))
    out = read(gpu, *own, None, CAPACITY, is_causal=True)
    assert error(out, expected(gpu, own[0], None, 4, own[1:], is_causal=True)) < 1e-3
