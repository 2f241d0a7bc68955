"""Attention of a chunk under a mask, in blocks: against the float64 reference, and what is skipped and read."""

import pytest
import torch
from stores import DEVICE, error, expected, read, tokens, twins, write

from kvarn import cuda
from kvarn.kernels import blocks, configs
from kvarn.reference import attention

BLOCKS = configs.PrefillConfig(64, 64, 32, 4, 2)
LEAST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks small enough that a mask of a few hundred keys has some of each kind."""
    if DEVICE == "cpu":
        monkeypatch.setattr(cuda.configs, "prefill", lambda *_: BLOCKS)


def attend(q, k, v, mask):
    mask = mask.to(DEVICE).expand(*q.shape[:3], k.shape[2])
    out = torch.full(q.shape, 7.0, dtype=q.dtype, device=DEVICE)
    return cuda._masked(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), mask, q.shape[-1] ** -0.5, out).cpu()


def inputs(rows, heads, group, n, length, dim, dtype=torch.float16):
    k, v = tokens(rows, heads, length, dim, dtype, 0)
    q = torch.randn(rows, heads * group, n, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    return q, k, v


def causal(n, length, offset):
    """Query i at position offset + i; [1, 1, n, length]."""
    return (torch.arange(length) <= offset + torch.arange(n)[:, None])[None, None]


def check(q, k, v, mask, limit=2e-3):
    out, reference = attend(q, k, v, mask), attention(q, k, v, mask)
    assert error(out, reference) < limit * (8 if q.dtype == torch.bfloat16 else 1)
    return out


KINDS = [(64, torch.float16), (128, torch.float16), (256, torch.float16)]
KINDS += [(64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16)] if DEVICE == "cuda" else []
"""The interpreter has no bfloat16 products."""


@pytest.mark.parametrize("dim, dtype", KINDS)
@pytest.mark.parametrize("n, length, offset", [(1, 1, 0), (65, 200, 100), (64, 128, 64), (130, 300, 150)])
def test_causal_chunks(dim, dtype, n, length, offset):
    check(*inputs(1, 1, 2, n, length, dim, dtype), causal(n, length, offset))


@pytest.mark.parametrize("group", [1, 4, 5, 8])
def test_query_heads_per_kv_head(group):
    check(*inputs(1, 2, group, 40, 150, 64), causal(40, 150, 100))


def test_queries_of_any_strides():
    q, k, v = inputs(2, 2, 3, 40, 150, 64)
    check(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, causal(40, 150, 100))


N, LENGTH = 90, 330
QUERY, POSITION = torch.arange(N)[:, None] + 200, torch.arange(LENGTH)
SEEN = QUERY >= POSITION
RANDOM = torch.Generator().manual_seed(0)
MASKS = {
    "causal": SEEN[None, None],
    "one per row": torch.stack([SEEN, (QUERY - 60 >= POSITION)])[:, None],
    "window": (SEEN & (QUERY - POSITION < 70))[None, None],
    "left padding": (SEEN & (torch.tensor([100, 3])[:, None, None] < POSITION))[:, None],
    "padding alone": (POSITION > 100)[None, None, None],
    "holes": torch.rand(2, 1, N, LENGTH, generator=RANDOM) < 0.5,
    "one per head": torch.rand(1, 3, N, LENGTH, generator=RANDOM) < 0.5,
    "documents": (POSITION // 90 == QUERY // 90)[None, None],
    "sink and window": (SEEN & ((POSITION < 70) | (QUERY - POSITION < 70)))[None, None],
    "minus infinity": torch.zeros(1, 1, N, LENGTH).masked_fill(~SEEN, -torch.inf),
    "least number": torch.zeros(1, 1, N, LENGTH).masked_fill(~SEEN, LEAST),
    "least bfloat16": torch.zeros(1, 1, N, LENGTH).masked_fill(~SEEN, LEAST).clamp_min(-3.3e38).bfloat16(),
    "least float16": torch.zeros(1, 1, N, LENGTH).half().masked_fill(~SEEN, torch.finfo(torch.float16).min),
    "bias": torch.randn(1, 1, N, LENGTH, generator=RANDOM),
    "bias per head and row": torch.randn(2, 3, N, LENGTH, generator=RANDOM).masked_fill(~SEEN, -torch.inf),
    "broadcast": torch.ones(1, 1, 1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    q, k, v = inputs(2, 1, 3, N, LENGTH, 64)
    out = check(q, k, v, MASKS[name])
    assert name == "broadcast" or error(out, attention(q, k, v)) > 0.05


@pytest.mark.parametrize("hidden", [False, -torch.inf])
def test_a_query_that_sees_nothing_gets_zeros(hidden):
    q, k, v = inputs(1, 1, 2, N, LENGTH, 64)
    mask = MASKS["causal" if hidden is False else "minus infinity"].clone()
    mask[0, 0, 7] = hidden
    out = check(q, k, v, mask)
    assert not out[:, :, 7].any() and out[:, :, 8].any()


def test_a_query_masked_by_the_least_number_averages():
    q, k, v = inputs(1, 1, 2, N, LENGTH, 64)
    mask = MASKS["least number"].clone()
    mask[0, 0, 7] = LEAST
    mask[0, 0, 8, 3:] = -torch.inf
    mask[0, 0, 8, :3] = LEAST
    out = check(q, k, v, mask)
    assert error(out[0, :, 7], v[0, :, :].double().mean(1).expand(2, -1)) < 1e-2


def poisoned(x, at):
    x = x.clone()
    x[:, :, at[0], 0], x[:, :, at[1]], x[:, :, at[2], 1] = torch.nan, torch.inf, -torch.inf
    return x


@pytest.mark.parametrize("name", ["causal", "minus infinity", "least number", "least bfloat16", "least float16"])
def test_what_hidden_tokens_hold_does_not_matter(name):
    """In blocks that are skipped, and in the one that the first queries do not see and the last ones do not either."""
    q, k, v = inputs(1, 2, 3, N, LENGTH, 64)
    at = (290, 300, 329)
    out = attend(q, poisoned(k, at), poisoned(v, at), MASKS[name])
    assert out.equal(attend(q, k, v, MASKS[name]))


def test_a_query_that_sees_a_poisoned_token_shows_it_and_no_other_does():
    q, k, v = inputs(1, 1, 2, N, LENGTH, 64)
    clean = attend(q, k, v, MASKS["causal"])
    for bad_k, bad_v in ((poisoned(k, (280, 281, 282)), v), (k, poisoned(v, (280, 281, 282)))):
        out = attend(q, bad_k, bad_v, MASKS["causal"])
        assert out[:, :, :80].equal(clean[:, :, :80])
        assert not out[:, :, 82:].isfinite().all(-1).any()


@pytest.mark.parametrize("name, lists", [
    # [plain, mixed] blocks of 64 queries x 64 keys, of the queries from 200 and those from 264 on
    ("causal", [([0, 1, 2], [3, 4]), ([0, 1, 2, 3], [4])]),
    ("window", [([], [2, 3, 4]), ([], [3, 4])]),
    ("least number", [([0, 1, 2], [3, 4]), ([0, 1, 2, 3], [4])]),
    ("documents", [([3], [2, 4]), ([], [2, 3, 4, 5])]),
    ("bias", [([], [0, 1, 2, 3, 4, 5])] * 2)])
def test_blocks_that_are_listed(name, lists):
    mask = MASKS[name].to(DEVICE)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    sights = torch.full((1, 1, N, 6), -1, dtype=torch.int8, device=DEVICE)
    order, counts = (torch.full((1, 1, 2, size), -1, dtype=torch.int32, device=DEVICE) for size in (6, 2))
    blocks.list_seen(mask, sights, order, counts, 64, 64)
    for row, (plain, mixed) in enumerate(lists):
        assert counts[0, 0, row].tolist() == [len(plain), len(mixed)]
        assert order[0, 0, row, : len(plain)].tolist() == plain
        assert order[0, 0, row].tolist()[::-1][: len(mixed)] == mixed


def test_a_query_that_sees_nothing_but_finite_entries_keeps_every_block():
    mask = MASKS["least number"].clone().to(DEVICE)
    mask[0, 0, 70] = LEAST
    sights = torch.empty((1, 1, N, 6), dtype=torch.int8, device=DEVICE)
    order, counts = (torch.empty((1, 1, 2, size), dtype=torch.int32, device=DEVICE) for size in (6, 2))
    blocks.list_seen(mask, sights, order, counts, 64, 64)
    assert counts[0, 0].tolist() == [[3, 2], [0, 6]]


def test_chunk_over_a_store_of_half_precision():
    """The whole op: history packed, the chunk's own tokens as they are."""
    _, gpu = twins("k4v2_g64", 2, 2, LENGTH, 64, torch.float16)
    write(None, gpu, *tokens(2, 2, 200, 64, torch.float16, 0), torch.arange(200))
    k, v = tokens(2, 2, N, 64, torch.float16, 1)
    at = torch.tensor([[200], [140]]) + torch.arange(N)
    write(None, gpu, k, v, at)
    q = torch.randn(2, 6, N, 64, generator=torch.Generator().manual_seed(3)).half()
    mask = (torch.arange(LENGTH) <= at[..., None])[:, None]
    out = read(gpu, q, k, v, at, mask, LENGTH)
    assert error(out, expected(gpu, q, mask, LENGTH, (k, v, at))) < 2e-3
    assert error(out, expected(gpu, q, mask, LENGTH)) > 3e-3  # the packed own tokens give something else


def test_a_negative_scale_and_float32_take_pytorchs_attention(monkeypatch):
    monkeypatch.delattr(cuda, "_masked")
    with pytest.raises(NameError):
        whole(torch.float16, 0.1)
    for dtype, scale in ((torch.float16, -0.1), (torch.float32, 0.1)):
        assert whole(dtype, scale).isfinite().all()


def whole(dtype, scale):
    _, gpu = twins("k4v2_g64", 1, 1, 128, 64, dtype)
    k, v = tokens(1, 1, 100, 64, dtype, 0)
    at = torch.arange(100)
    write(None, gpu, k, v, at)
    return cuda.attend_cuda(*(x.to(DEVICE) for x in (k, k, v, at)), *gpu.tensors(), causal(100, 128, 0).to(DEVICE), 128,
                            False, scale, gpu.spec.key)
