"""One query token per row over packed tiles, against the float64 reference over the same bytes."""

import pytest
import torch
from stores import DEVICE, error, expected, read, tokens, twins

from kvarn import decode_cuda
from kvarn.append import append_cpu
from kvarn.layout import store_layout
from kvarn.spec import PRESETS, QuantSpec

CAPACITY = 300
LEAST = torch.finfo(torch.float32).min
POSITION = torch.arange(CAPACITY)


def filled(spec, dim, dtype, lengths, heads=2, capacity=CAPACITY):
    """A store whose rows hold lengths[b] tokens, of which the last was written alone, by the CPU implementation."""
    cpu, gpu = twins(spec, len(lengths), heads, capacity, dim, dtype)
    at = torch.tensor(lengths)[:, None]
    for row, length in enumerate(lengths):
        if length > 1:
            k, v = tokens(1, heads, length - 1, dim, dtype, row)
            part = [t[row : row + 1] for t in cpu.tensors()[:3]]
            append_cpu(k, v, torch.arange(length - 1), *part, cpu.balance, cpu.capacity, cpu.spec.key)
    k, v = tokens(len(lengths), heads, 1, dim, dtype, 99)
    append_cpu(k, v, at - 1, *cpu.tensors(), cpu.capacity, cpu.spec.key)
    for mine, its in zip(gpu.tensors(), cpu.tensors(), strict=True):
        mine.copy_(its)
    return gpu, k, v, at - 1


def check(gpu, k, v, at, query_heads, mask, kv_len, limit=3e-3):
    q = torch.randn(len(at), query_heads, 1, k.shape[-1], generator=torch.Generator().manual_seed(5)).to(k.dtype)
    out = read(gpu, q, k, v, at, mask, kv_len)
    reference = expected(gpu, q, mask, kv_len)
    assert error(out, reference) < (limit if k.dtype != torch.bfloat16 else 6e-3)
    return out, reference


@pytest.mark.parametrize("lengths", [(1, 2), (127, 128), (129, 255), (256, 257)])
def test_tile_edges(lengths):
    gpu, k, v, at = filled("k4v2_g128", 64, torch.float16, lengths)
    mask = (at >= POSITION)[:, None, None]
    check(gpu, k, v, at, 2, mask, CAPACITY)


@pytest.mark.parametrize("ratio", [1, 4, 5, 7, 8, 16])
def test_query_heads_per_kv_head(ratio):
    gpu, k, v, at = filled("k4v2_g64", 64, torch.float32, (200, 70))
    check(gpu, k, v, at, 2 * ratio, None, 200)


SPECS = [("k4v4_g64", 64, torch.float32), ("k8v8_g128", 64, torch.float16), ("k4v2_g128", 128, torch.bfloat16),
         (QuantSpec(2, 4, 64, exact_rows=2), 128, torch.float32),
         (QuantSpec(4, 2, 64, exact_rows=0), 64, torch.float16)]


@pytest.mark.parametrize("spec,dim,dtype", SPECS + ([("k4v2_g128", 256, torch.float16)] if DEVICE == "cuda" else []))
def test_formats(spec, dim, dtype):
    gpu, k, v, at = filled(spec, dim, dtype, (290, 130))
    check(gpu, k, v, at, 6, (at >= POSITION)[:, None, None], CAPACITY)


MASKS = {
    "left padding, additive": torch.zeros(2, 1, 1, CAPACITY).masked_fill(POSITION < 90, LEAST),
    "minus infinity": torch.zeros(2, 1, 1, CAPACITY).masked_fill(POSITION % 3 == 0, -torch.inf),
    "window": ((POSITION > 140) & (POSITION < 170)).expand(1, 1, 1, CAPACITY),
    "holes": (torch.rand(2, 1, 1, CAPACITY, generator=torch.Generator().manual_seed(0)) < 0.5),
    "heads differ": (torch.rand(1, 4, 1, CAPACITY, generator=torch.Generator().manual_seed(1)) < 0.5),
    "bias": torch.randn(2, 1, 1, CAPACITY, generator=torch.Generator().manual_seed(2)),
    "bias per head": torch.randn(1, 4, 1, CAPACITY, generator=torch.Generator().manual_seed(3)),
    "broadcast": torch.ones(1, 1, 1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    gpu, k, v, at = filled("k4v2_g64", 64, torch.float32, (280, 150))
    out, _ = check(gpu, k, v, at, 4, MASKS[name], CAPACITY)
    unmasked = expected(gpu, torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(5)), None, CAPACITY)
    assert name == "broadcast" or error(out, unmasked) > 0.05


def test_a_query_that_sees_nothing_gets_zeros():
    gpu, k, v, at = filled("k4v2_g64", 64, torch.float32, (100, 80))
    mask = torch.zeros(1, 1, 1, CAPACITY, dtype=torch.bool)
    assert not read(gpu, torch.randn(2, 4, 1, 64), k, v, at, mask, CAPACITY).any()


def test_a_query_masked_by_the_least_number_averages():
    gpu, k, v, at = filled("k4v2_g64", 64, torch.float32, (100, 80))
    check(gpu, k, v, at, 4, torch.full((1, 1, 1, CAPACITY), LEAST), CAPACITY, limit=2e-2)


def test_never_written_store_reads_zeros():
    _, gpu = twins("k4v2_g64", 1, 2, 192, 64, torch.float32)
    k, v = tokens(1, 2, 1, 64, torch.float32, 0)
    out = read(gpu, torch.randn(1, 2, 1, 64), k, v, torch.tensor([[0]]), None, 192)
    assert not out.any()


def test_graphs_use_the_sign_matrix_made_before_and_keep_none_of_theirs(monkeypatch):
    layout, device = store_layout(PRESETS["k4v2_g128"].key, 64, torch.float16), torch.device(DEVICE)
    monkeypatch.setattr(decode_cuda, "_SIGNS", {})
    monkeypatch.setattr(decode_cuda, "_capturing", lambda device: True)
    assert decode_cuda.signs(layout, device) is not decode_cuda.signs(layout, device)
    monkeypatch.setattr(decode_cuda, "_capturing", lambda device: False)
    made = decode_cuda.signs(layout, device)
    monkeypatch.setattr(decode_cuda, "_capturing", lambda device: True)
    assert decode_cuda.signs(layout, device) is made
    assert (made.float() @ made.float().T).equal(32 * torch.eye(32, device=device))
