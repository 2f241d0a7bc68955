"""A long chunk over a paged store: unpacked history, its own tokens unrounded, causal."""

import pytest
import torch
from pages import Pages
from stores import DEVICE, error

from kvarn import paged_cuda
from kvarn.errors import ShapeError
from kvarn.paged import attend_paged_cpu, unpacked_starts

COUNTS = (70, 0, 129)
SPECS = [("k4v2_g128", 64, torch.float16), ("k16v16", 48, torch.float32)]
SPECS += [("k4v2_g128", 128, torch.bfloat16), ("k16v16", 80, torch.bfloat16)] if DEVICE == "cuda" else []


def step(pages, counts, padding=2):
    """A step's q, k, v [n, heads, D], n with padding, after its append; and table, starts, ends, balance."""
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) for x in pages.write(counts, padding))
    q = torch.randn(len(k), 3 * pages.heads, pages.dim, generator=torch.Generator().manual_seed(1)).to(pages.dtype)
    return (q, k, v), (*pages.where(counts), pages.balance)


def attend(pages, own, where, max_count, max_end):
    out = paged_cuda.attend_paged_cuda(*(x.to(DEVICE) for x in own), pages.gpu, *(x.to(DEVICE) for x in where),
                                       max_count, max_end, pages.dim**-0.5, pages.spec.key)
    assert out.is_contiguous() and out.dtype == own[0].dtype
    return out.cpu()


@pytest.mark.parametrize("spec, dim, dtype", SPECS)
@pytest.mark.parametrize("one_row_at_a_time", [False, True])
def test_ragged_chunks(spec, dim, dtype, one_row_at_a_time, monkeypatch):
    if one_row_at_a_time:
        monkeypatch.setattr(paged_cuda, "SCRATCH_BYTES", 1)
    pages = Pages(spec, dim, dtype)
    pages.write((60, 66, 0))
    own, where = step(pages, COUNTS)
    scale = dim**-0.5
    expected = attend_paged_cpu(*own, pages.gpu.cpu(), *where, max(COUNTS), 130, scale, pages.spec.key)
    out = attend(pages, own, where, max(COUNTS) + 3, 140)  # the bounds may be loose
    assert error(out, expected.double()) < (1e-5 if dtype == torch.float32 else 8e-3)
    assert not out[sum(COUNTS) :].any()
    exchanged = where[0].flip(0), *where[1:]
    assert not error(attend(pages, own, exchanged, max(COUNTS), 130), expected.double()) < 0.05


def test_own_tokens_are_not_read_from_the_store():
    pages = Pages("k4v2_g128", 64, torch.float16)
    own, where = step(pages, COUNTS)
    out = attend(pages, own, where, max(COUNTS), 130)
    strange = own[0], own[1].flip(0), own[2]
    assert error(attend(pages, strange, where, max(COUNTS), 130), out.double()) > 0.05


@pytest.mark.parametrize("spec", ["k4v2_g128", "k16v16"])
def test_unpacked_rows_follow_each_other(spec):
    pages = Pages(spec, 64, torch.float16)
    pages.write((60, 66, 0))
    (_, k, v), where = step(pages, COUNTS)
    table, starts, ends, balance = (x.to(DEVICE) for x in where)
    to = unpacked_starts(starts, ends)
    assert to.tolist() == [0, 130, 130, 259] and to.dtype == torch.int32
    key, value = paged_cuda.unpack_paged(k.to(DEVICE), v.to(DEVICE), pages.gpu, table, starts, ends, to, balance, 259,
                                         130, pages.spec.key)
    for out, plain in ((key, pages.k), (value, pages.v)):
        for row, first in ((0, 60), (2, 0)):
            got = out[to[row] : to[row + 1]].cpu()
            assert got[first:].equal(plain[row][first:])
            assert got.equal(plain[row]) if spec == "k16v16" else error(got, plain[row].double()) < 0.4


def test_queries_that_do_not_fit_are_refused():
    pages = Pages("k4v2_g128", 64, torch.float16)
    own, where = step(pages, (1, 0, 0))
    with pytest.raises(ShapeError, match="multiple"):
        attend(pages, (own[0][:, :3], *own[1:]), where, 1, 1)
