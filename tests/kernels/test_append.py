"""append on the GPU writes what append on the CPU writes, whatever the order of positions."""

import pytest
import torch
from stores import DEVICE, balance, error, expected, read, tokens, twins, write

from kvarn.append import append_cpu
from kvarn.cache import PackedCache
from kvarn.cuda import append_cuda
from kvarn.errors import ShapeError, SpecError
from kvarn.frame import keys_in, values_in
from kvarn.quantize import encode
from kvarn.spec import PRESETS, QuantSpec

REAL = [("k4v2_g128", 128, torch.float16), ("k4v2_g128", 256, torch.bfloat16), ("k8v8_g128", 128, torch.float16)]
CASES = [("k4v2_g64", 64, torch.float32), ("k4v4_g64", 64, torch.float16),
         (QuantSpec(2, 8, 64, exact_rows=3), 128, torch.float32)] + (REAL if DEVICE == "cuda" else [])
NEARLY_ALL = {2: 2e-3, 4: 2e-3, 8: 4e-3}
"""Bits of a value -> share of bytes that may differ: sums in another order move a value across a rounding edge now and
then, the more often the more edges there are."""


def same(cpu, gpu) -> None:
    records, tail, lengths, _ = (t.cpu() for t in gpu.tensors())
    few = NEARLY_ALL[gpu.spec.v_bits]
    assert lengths.equal(cpu.lengths)
    assert (records != cpu.records).double().mean() < few
    assert (tail != cpu.tail).double().mean() < few
    for a, b in zip(gpu.unpack(), cpu.unpack(), strict=True):
        assert error(a.cpu(), b.double()) < 1e-2


@pytest.mark.parametrize("spec,dim,dtype", CASES)
def test_any_order_of_writes(spec, dim, dtype):
    cpu, gpu = twins(spec, 2, 2, 400, dim, dtype)
    g = gpu.spec.group
    steps = [(1, (0, 0)),              # the first token
             (g - 2, (1, 1)),          # all but one slot of the tile
             (1, (g - 1, g - 1)),      # full to the brim: stays open
             (1, (g, 5)),              # row 0 closes it, row 1 writes inside it
             (2 * g + 3, (g + 1, 6)),  # completes several tiles
             (1, (3, 3 * g - 1)),      # back into a closed tile: it is opened again
             (g + 1, (g // 2, 0))]     # from the middle of one tile into the next
    for seed, (n, starts) in enumerate(steps):
        k, v = tokens(2, 2, n, dim, dtype, seed)
        write(cpu, gpu, k, v, torch.tensor(starts)[:, None] + torch.arange(n))
        same(cpu, gpu)


def test_fewer_rows_than_the_store_and_shared_positions():
    cpu, gpu = twins("k4v2_g64", 3, 1, 200, 64, torch.float32)
    k, v = tokens(2, 1, 70, 64, torch.float32, 0)
    write(cpu, gpu, k, v, torch.arange(70))
    same(cpu, gpu)
    assert gpu.lengths.tolist() == [70, 70, 0] and not gpu.records[2].any() and not gpu.tail[2].any()


def test_a_balance_of_any_strides():
    cpu, gpu = (PackedCache.empty("k4v2_g64", 1, 2, 100, 64, torch.float32, device, balance(2, 64).t().contiguous().t())
                for device in ("cpu", DEVICE))
    k, v = tokens(1, 2, 70, 64, torch.float32, 0)
    write(cpu, gpu, k, v, torch.arange(70))
    same(cpu, gpu)


def test_heads_further_apart_than_32_bits_count():
    """A chunk of a million tokens, or any other stride: three heads, of which the last begins 2^31 entries on."""
    cpu, gpu = twins("k4v2_g64", 1, 3, 200, 64, torch.float16)
    plain = tokens(1, 3, 150, 64, torch.float16, 0)
    apart = []
    for x in plain:
        apart.append(torch.empty((1 << 31) + 150 * 64, dtype=x.dtype, device=DEVICE)  # its pages are never touched
                     .as_strided(x.shape, (1, 1 << 30, 64, 1)))
        apart[-1].copy_(x)
    positions = torch.arange(150)
    append_cpu(*plain, positions, *cpu.tensors(), cpu.capacity, cpu.spec.key)
    append_cuda(*apart, positions.to(DEVICE), *gpu.tensors(), gpu.capacity, gpu.spec.key)
    same(cpu, gpu)


def test_a_position_outside_the_capacity_writes_nothing():
    _, gpu = twins("k4v2_g64", 1, 1, 64, 64, torch.float32)
    k, v = tokens(1, 1, 1, 64, torch.float32, 0)
    for position in (64, -1):
        write(None, gpu, k, v, torch.tensor([position]))
    assert not any(t.any() for t in gpu.tensors()[:3])


def test_records_have_the_quantizers_bytes():
    _, gpu = twins("k4v2_g64", 1, 2, 192, 64, torch.float32)
    gpu.balance.fill_(1)
    k, v = tokens(1, 2, 129, 64, torch.float32, 3)
    write(None, gpu, k, v, torch.arange(129))
    framed = (x[:, :, :128].unflatten(2, (2, 64)) for x in
              (keys_in(k, torch.ones(2, 64), gpu.layout), values_in(v, gpu.layout)))
    assert (gpu.records[:, :, :2].cpu() != encode(*framed, gpu.layout)).double().mean() < NEARLY_ALL[gpu.spec.v_bits]


def test_nan_and_infinity_do_not_reach_other_tokens():
    _, gpu = twins("k4v2_g64", 1, 1, 128, 64, torch.float32)
    k, v = tokens(1, 1, 65, 64, torch.float32, 1)
    k[0, 0, 3, 2], v[0, 0, 4, 1], v[0, 0, 64, 0] = torch.nan, torch.inf, torch.nan
    write(None, gpu, k, v, torch.arange(65))
    for x, y, bad in zip(gpu.unpack(), (k, v), ((3,), (4, 64)), strict=True):
        x = x.cpu()
        assert x.isfinite().all()
        fine = [t for t in range(65) if t not in bad]
        assert error(x[:, :, fine], y[:, :, fine].double()) < 0.5


def test_chunk_attends_history_packed_and_itself_unrounded():
    _, gpu = twins("k4v2_g64", 2, 2, 300, 64, torch.float32)
    write(None, gpu, *tokens(2, 2, 150, 64, torch.float32, 0), torch.arange(150))
    k, v = tokens(2, 2, 40, 64, torch.float32, 1)
    at = torch.tensor([[150], [90]]) + torch.arange(40)
    write(None, gpu, k, v, at)
    q = torch.randn(2, 6, 40, 64)
    mask = (torch.arange(300) <= at[..., None])[:, None]
    out = read(gpu, q, k, v, at, mask, 300)
    assert error(out, expected(gpu, q, mask, 300, (k, v, at))) < 1e-3
    assert error(out, expected(gpu, q, mask, 300)) > 1e-3  # the packed own tokens give something else


def test_causal_chunk():
    _, gpu = twins("k4v2_g64", 1, 2, 128, 64, torch.float32)
    k, v = tokens(1, 2, 70, 64, torch.float32, 1)
    write(None, gpu, k, v, torch.arange(70))
    q = torch.randn(1, 2, 70, 64)
    out = read(gpu, q, k, v, torch.arange(70), None, 70, is_causal=True)
    assert error(out, expected(gpu, q, None, 70, (k, v, torch.arange(70)[None]), is_causal=True)) < 1e-3


def test_lossless_keeps_every_bit():
    cpu, gpu = twins("k16v16", 2, 2, 400, 48, torch.float16)
    for seed, (n, starts) in enumerate([(5, (0, 0)), (200, (5, 3)), (1, (205, 20)), (1, (10, 390))]):
        k, v = tokens(2, 2, n, 48, torch.float16, seed)
        at = torch.tensor(starts)[:, None] + torch.arange(n)
        write(cpu, gpu, k, v, at)
        assert all(a.cpu().equal(b) for a, b in zip(gpu.unpack(), cpu.unpack(), strict=True))
        q = torch.randn(2, 4, n, 48).half()
        mask = (torch.arange(400) <= at[..., None])[:, None]
        assert error(read(gpu, q, k, v, at, mask, 400), expected(gpu, q, mask, 400)) < 2e-3


def test_refusals_name_what_is_valid():
    _, gpu = twins(QuantSpec(3, 2, 64), 1, 1, 64, 64, torch.float32)
    k, v = tokens(1, 1, 1, 64, torch.float32, 0)
    with pytest.raises(SpecError, match="bits"):
        write(None, gpu, k, v, torch.tensor([0]))
    _, gpu = twins(PRESETS["upstream_k4v2_g128"], 1, 1, 64, 64, torch.float32)
    with pytest.raises(SpecError, match="kvarn"):
        write(None, gpu, k, v, torch.tensor([0]))
    _, gpu = twins("k4v2_g64", 1, 1, 64, 32, torch.float32)
    with pytest.raises(ShapeError, match="head_dim"):
        write(None, gpu, *tokens(1, 1, 1, 32, torch.float32, 0), torch.tensor([0]))
    _, gpu = twins(QuantSpec(2, 4, 64), 1, 1, 64, 64, torch.float32)
    with pytest.raises(ShapeError, match=r"head_dim=64 .* keys of 2 bits; valid there: \(128, 256\)"):
        write(None, gpu, k, v, torch.tensor([0]))
