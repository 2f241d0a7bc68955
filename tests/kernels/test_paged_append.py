"""append_paged on the GPU writes the bytes append_paged on the CPU writes, and no others."""

import pytest
import torch
from pages import Pages
from stores import DEVICE, error

from kvarn.errors import ShapeError, SpecError
from kvarn.paged import append_paged_cpu
from kvarn.paged_cuda import append_paged_cuda
from kvarn.quantize import decode
from kvarn.spec import QuantSpec

NEARLY_ALL = 2e-3
"""Share of bytes that may differ: sums in another order move a value across a rounding edge now and then."""

SPECS = [("k4v2_g128", 64, torch.float16)]  # most tests share this one: on a GPU each other one compiles for 20 s
if DEVICE == "cuda":
    SPECS += [("k4v2_g128", 128, torch.bfloat16), ("k8v8_g128", 256, torch.float16)]
else:
    SPECS += [("k4v2_g64", 64, torch.float32), (QuantSpec(2, 4, 64, exact_rows=2), 128, torch.float16)]
STEPS = {"around a tile": [(127, 1, 128), (1, 127, 1), (1, 1, 1)],
         "many at once": [(129, 0, 300), (200, 5, 1), (60, 70, 0)],
         "token by token over an edge": [(126, 61, 60), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)],
         "a few tokens over an edge": [(120, 125, 50), (5, 4, 6), (5, 4, 9)]}


def same(pages, before) -> None:
    """Equal but for ties; and equal to the bit wherever the CPU wrote nothing."""
    gpu = pages.gpu.cpu()
    untouched = pages.cpu == before
    assert not untouched.all()
    assert (gpu != pages.cpu).double().mean() < NEARLY_ALL
    blocks = (pages.cpu != before).flatten(1).any(1)
    assert gpu[~blocks].equal(before[~blocks])
    changed = ~untouched
    assert (gpu[changed] != pages.cpu[changed]).double().mean() < 10 * NEARLY_ALL


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("spec, dim, dtype", SPECS)
def test_ragged_steps(spec, dim, dtype, name):
    pages = Pages(spec, dim, dtype, padded=256)
    before = pages.cpu.clone()
    for counts in STEPS[name]:
        pages.write(counts, padding=3)
        same(pages, before)


@pytest.mark.parametrize("taken", [9, 4, 3])
def test_speculation_rolled_back_over_a_tile_edge(taken):
    pages = Pages("k4v2_g128", 64, torch.float16, rows=1)
    before = pages.cpu.clone()
    g = pages.spec.group
    pages.write((g - 5,))
    pages.write((10,))
    pages.take_back((taken,))
    for count in (1, 3, 12, 1):
        pages.write((count,))
        same(pages, before)


def test_a_row_of_many_tokens_that_overwrites_the_pages_it_closes():
    """Page 1 of a tile lies where the tile before has page 0: written too early, the closed tile is wrong."""
    pages = Pages("k4v2_g128", 64, torch.float16, rows=2)
    before = pages.cpu.clone()
    pages.write((120, 3))
    pages.write((80, 1))  # 8 tokens close the tile, 72 are more than a page
    assert pages.layout.page < 72
    same(pages, before)


def test_padding_and_rows_without_tokens_write_nothing():
    pages = Pages("k4v2_g128", 64, torch.float16)
    before = pages.gpu.clone()
    pages.write((0, 0, 0), padding=5)
    assert pages.gpu.equal(before)


@pytest.mark.parametrize("spec", ["k4v2_g128", "k16v16"])
def test_a_row_without_tokens_may_have_any_length(spec):
    """Its length is near int32's end, where sums wrap: behind a row that fills tiles, and behind padding."""
    pages = Pages(spec, 64, torch.float16)
    k, v = pages.new((256, 0, 0))
    table, starts, ends = pages.where((256, 0, 0))
    ends[1:] = 2**31 - 1
    append_paged_cpu(k, v, pages.cpu, table[:1], starts[:2], ends[:1], pages.balance, pages.spec.key)
    joint = torch.cat([torch.stack([k, v], 1), torch.zeros(140, 2, *k.shape[1:], dtype=k.dtype)])
    append_paged_cuda(*joint.to(DEVICE).unbind(1), pages.gpu, *(x.to(DEVICE) for x in (
        table, starts, ends, pages.balance)), pages.spec.key)
    assert (pages.gpu.cpu() != pages.cpu).double().mean() < NEARLY_ALL


def test_nan_and_infinity_do_not_reach_other_tokens():
    pages = Pages("k4v2_g128", 64, torch.float16, rows=1)
    k, v = pages.new((129,))
    k, v = k.clone(), v.clone()
    k[3, 0, 2], v[4, 0, 1], v[128, 0, 0] = torch.nan, torch.inf, torch.nan
    where = (*pages.where((129,)), pages.balance)
    append_paged_cuda(k.to(DEVICE), v.to(DEVICE), pages.gpu, *(x.to(DEVICE) for x in where), pages.spec.key)
    record = pages.gpu[int(pages.table[0, 0])].cpu()
    cpu = pages.cpu.clone()
    append_paged_cpu(k, v, cpu, *where, pages.spec.key)
    for x, y in zip(decode(record, pages.layout), decode(cpu[int(pages.table[0, 0])], pages.layout), strict=True):
        assert x.isfinite().all() and error(x, y.double()) < 1e-2
    assert (pages.gpu.cpu() != cpu).double().mean() < NEARLY_ALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lossless_keeps_every_bit(dtype):
    pages = Pages("k16v16", 48, dtype, heads=1, padded=64)
    for counts in ((127, 1, 0), (1, 128, 3), (1, 0, 130)):
        pages.write(counts, padding=2)
        assert pages.gpu.cpu().equal(pages.cpu)
    pages.take_back((3, 100, 1))
    for counts in ((1, 1, 1), (4, 110, 0)):
        pages.write(counts)
        assert pages.gpu.cpu().equal(pages.cpu)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs")
@pytest.mark.parametrize("spec", ["k4v2_g128", "k16v16"])
def test_a_captured_step_follows_the_device(spec):
    """One graph, replayed for steps of other rows' tokens, lengths and blocks."""
    pages = Pages(spec, 64, torch.float16, rows=2)
    k, v = (torch.zeros(140, 2, 64, dtype=torch.float16, device=DEVICE) for _ in range(2))
    where = [x.to(DEVICE) for x in (pages.table, torch.zeros(3).int(), torch.zeros(2).int(), pages.balance)]
    append_paged_cuda(k, v, pages.gpu, *where, pages.spec.key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_paged_cuda(k, v, pages.gpu, *where, pages.spec.key)
    before = pages.cpu.clone()
    for counts in ((126, 3), (3, 1), (0, 140), (135, 5)):
        own, now = pages.new(counts), pages.where(counts)
        append_paged_cpu(*own, pages.cpu, *now, pages.balance, pages.spec.key)
        for buffer, x in zip((k, v), own, strict=True):
            buffer[: len(x)] = x.to(DEVICE)
        where[1].copy_(now[1])
        where[2].copy_(now[2])
        graph.replay()
        same(pages, before)


def test_a_step_that_starts_anywhere():
    """A part of a larger step: the other tokens are another call's."""
    pages = Pages("k4v2_g128", 64, torch.float16, rows=2)
    k, v = pages.new((70, 130))
    table, starts, ends = pages.where((70, 130))
    for low in range(2):
        part = table[low : low + 1], starts[low : low + 2], ends[low : low + 1]
        append_paged_cuda(k.to(DEVICE), v.to(DEVICE), pages.gpu, *(x.to(DEVICE) for x in (*part, pages.balance)),
                          pages.spec.key)
    before = pages.cpu.clone()
    append_paged_cpu(k, v, pages.cpu, table, starts, ends, pages.balance, pages.spec.key)
    same(pages, before)


def test_refusals_name_what_is_valid():
    pages = Pages(QuantSpec(3, 2, 64), 64, torch.float32, rows=1)
    k, _ = pages.new((1,))
    where = (*pages.where((1,)), pages.balance)
    with pytest.raises(SpecError, match="bits"):
        append_paged_cuda(k, k, pages.gpu, *where, pages.spec.key)
    with pytest.raises(ShapeError, match="valid"):
        append_paged_cuda(k[:, :1], k[:, :1], pages.gpu, *where, pages.spec.key)
    with pytest.raises(ShapeError, match="multiples"):
        append_paged_cuda(k, k, pages.gpu.flatten()[1:-(2 * pages.layout.record_bytes - 1)].view(
            -1, 2, pages.layout.record_bytes), *where, pages.spec.key)
