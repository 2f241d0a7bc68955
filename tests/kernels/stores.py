"""Twin stores for kernel tests: one written by the CPU implementation, one by the kernels."""

import torch
from torch import Tensor

from kvarn.append import append_cpu
from kvarn.cache import PackedCache
from kvarn.cuda import append_cuda, attend_cuda
from kvarn.reference import attention, read_store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tokens(rows: int, heads: int, n: int, dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """k, v [rows, heads, n, dim] with outlier channels in k and a few tokens of tiny and of large values."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(rows, heads, n, dim, generator=g) for _ in range(2))
    k[..., :3] *= 8
    k[..., 5] += 20
    v *= torch.where(torch.rand(rows, heads, n, 1, generator=g) < 0.05, 0.05, 1.0)
    return k.to(dtype), v.to(dtype)


def balance(heads: int, dim: int) -> Tensor:
    return torch.rand(heads, dim, generator=torch.Generator().manual_seed(7)) + 0.5


def twins(spec, rows: int, heads: int, capacity: int, dim: int, dtype: torch.dtype) -> tuple[PackedCache, PackedCache]:
    """A CPU store and an equal one on DEVICE."""
    b = balance(heads, dim)
    return (PackedCache.empty(spec, rows, heads, capacity, dim, dtype, balance=b),
            PackedCache.empty(spec, rows, heads, capacity, dim, dtype, DEVICE, b))


def write(cpu: PackedCache | None, gpu: PackedCache, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """Append to both; positions [n] or [B', n]."""
    if cpu is not None:
        append_cpu(k, v, positions, *cpu.tensors(), cpu.capacity, cpu.spec.key)
    append_cuda(k.to(DEVICE), v.to(DEVICE), positions.to(DEVICE), *gpu.tensors(), gpu.capacity, gpu.spec.key)


def read(gpu: PackedCache, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None, kv_len: int,
         is_causal: bool = False) -> Tensor:
    """attend on DEVICE, back on the CPU; checks that fresh memory is poisoned nowhere in the result."""
    mask = None if mask is None else mask.to(DEVICE)
    out = attend_cuda(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), positions.to(DEVICE), *gpu.tensors(), mask, kv_len,
                      is_causal, q.shape[-1] ** -0.5, gpu.spec.key).cpu()
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert out.isfinite().all()
    return out


def expected(gpu: PackedCache, q: Tensor, mask: Tensor | None, kv_len: int, own=None,
             is_causal: bool = False) -> Tensor:
    """The float64 reference over what the store holds; own = (k, v, positions [B', n]) stand unrounded."""
    records, tail, lengths, scale = (t.cpu() for t in gpu.tensors())
    k, v = read_store(records, tail, lengths, scale, gpu.layout)
    k, v = k[: q.shape[0]].clone(), v[: q.shape[0]].clone()
    if own is not None:
        for row, at in enumerate(own[2].expand(q.shape[0], -1)):
            k[row, :, at], v[row, :, at] = own[0][row].double(), own[1][row].double()
    return attention(q, k[:, :, :kv_len], v[:, :, :kv_len], mask, is_causal)


def error(out: Tensor, reference: Tensor) -> float:
    """Relative error of the whole tensor in the Frobenius norm."""
    return float((out.double() - reference).norm() / reference.norm())
