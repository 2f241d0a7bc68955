"""kvarn::append_paged and kvarn::attend_paged on a GPU: which kernels run, with what scratch.

Semantics are the CPU implementations' (paged.py). Every address follows on the device from table, starts and ends, and
every size from plain integers: nothing waits for the device, and a step can be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from kvarn.decode_cuda import decode_limit, decode_paged
from kvarn.device import assembly, capability, channels_last, check_blocks, kernel_offsets, on_own_device, processors
from kvarn.errors import ShapeError
from kvarn.kernels import configs, paged_append, paged_unpack, raw_pages
from kvarn.paged import unpacked_starts
from kvarn.paged_layout import PagedLayout, paged_layout

SCRATCH_BYTES = 1 << 28
"""A chunk unpacks as many rows at a time as fit here (at least one)."""


@on_own_device
def append_paged_cuda(k: Tensor, v: Tensor, cache: Tensor, table: Tensor, starts: Tensor, ends: Tensor,
                      balance: Tensor, spec: str) -> None:
    """Store a step's tokens k, v [n, H, D]; see append_paged_cpu. The step's may start at any starts[0].

    Raises:
        ShapeError: if k and v do not fit the cache.
        SpecError: for a preset no kernel exists for.
    """
    layout = paged_layout(spec, k.shape[-1], k.dtype)
    _check(k, v, cache, layout)
    if k.shape[0] == 0 or table.shape[0] == 0:
        return
    k, v = channels_last(k), channels_last(v)
    if layout.spec.method == "raw":
        raw_pages.append(k, v, cache, table, starts, ends, **configs.raw_offsets(layout))
        return
    per = configs.rows_per_look(table.shape[0], k.shape[1], processors(k.device))
    shape = layout.head_dim, layout.spec.group, capability(k.device)
    paged_append.append(k, v, cache, table, starts, ends, balance, per, configs.leave(*shape), *configs.fill(*shape),
                        assembly(k.device), layout.page, layout.spare, **kernel_offsets(layout))


def unpack_paged(k: Tensor, v: Tensor, cache: Tensor, table: Tensor, starts: Tensor, ends: Tensor, to: Tensor,
                 balance: Tensor, size: int, max_end: int, spec: str) -> tuple[Tensor, Tensor]:
    """The keys and values that a step's rows attend, for a variable-length attention; arguments as in attend_paged.

    Args:
        to: unpacked_starts of the rows (paged.py), which every layer of a step shares.
        size: at least to[B].

    Returns:
        key, value: [size, H, D] in k's dtype, plain frame; row b's tokens, the step's own unrounded, are entries to[b]
            .. to[b + 1] - 1. What follows the last is unset.

    Raises:
        ShapeError: if k and v do not fit the cache.
        SpecError: for a preset no kernel exists for.
    """
    layout = paged_layout(spec, k.shape[-1], k.dtype)
    _check(k, v, cache, layout)
    heads, dim = k.shape[1:]
    key, value = (k.new_empty(size, heads, dim) for _ in range(2))
    if layout.spec.method == "raw":
        raw_pages.read(cache, table, starts, ends, to, key, value, max_end, **configs.raw_offsets(layout))
    else:
        paged_unpack.unpack(channels_last(k), channels_last(v), cache, table, starts, ends, to, balance, key, value,
                            max_end, *configs.unpack_paged(dim), layout.page, layout.spare, **kernel_offsets(layout))
    return key, value


@on_own_device
def attend_paged_cuda(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, table: Tensor, starts: Tensor, ends: Tensor,
                      balance: Tensor, max_count: int, max_end: int, scale: float, spec: str) -> Tensor:
    """Causal attention of a step's tokens q [n, Hq, D] over their rows; see attend_paged_cpu. Few tokens a row read the
    packed tiles; a longer chunk unpacks its rows and runs PyTorch's attention on them.

    Raises:
        ShapeError: if q, k and v do not fit the cache.
        SpecError: for a preset no kernel exists for.
    """
    layout = paged_layout(spec, q.shape[-1], q.dtype)
    _check(k, v, cache, layout)
    if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
        raise ShapeError(f"q {tuple(q.shape)} for k {tuple(k.shape)}; valid: as many tokens, a multiple of its heads")
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    rows = table.shape[0]
    if q.shape[0] == 0 or rows == 0 or max_count == 0:
        return out
    if layout.spec.method != "raw" and max_count <= decode_limit(q.shape[1] // k.shape[1]):
        return decode_paged(q, cache, table, starts, ends, balance, max_count, max_end, scale, layout, out)
    step = max(1, SCRATCH_BYTES // (2 * max_end * k.shape[1] * layout.head_dim * k.element_size()))
    for low in range(0, rows, step):
        part, edges = slice(low, low + step), starts[low : low + step + 1]
        to = unpacked_starts(edges, ends[part])
        key, value = unpack_paged(k, v, cache, table[part], edges, ends[part], to, balance, (len(to) - 1) * max_end,
                                  max_end, spec)
        attention = _flash if _has_flash(q) else _padded
        found = attention(q, key, value, edges, to, max_count, max_end, scale)
        token = torch.arange(q.shape[0], device=q.device)
        out = torch.where(((token >= edges[0]) & (token < edges[-1]))[:, None, None], found, out)
    return out


def _flash(q: Tensor, key: Tensor, value: Tensor, starts: Tensor, to: Tensor, max_count: int, max_end: int,
           scale: float) -> Tensor:
    """Row b's queries q[starts[b] : starts[b + 1]] are the last of its keys key[to[b] : to[b + 1]]: flash attention's
    own reading of "causal". (The operator: arguments of torch.nn.attention.varlen change between versions.)
    """
    # max_q 1 would make the operator take q for [rows, Hq, D], without rows of no token and without padding.
    return torch.ops.aten._flash_attention_forward(q, key, value, starts.int(), to, max(max_count, 2), max_end, 0.0,
                                                   True, False, scale=scale)[0]


def _padded(q: Tensor, key: Tensor, value: Tensor, starts: Tensor, to: Tensor, max_count: int, max_end: int,
            scale: float) -> Tensor:
    """The same by plain tensor operations on rows padded to max_count and max_end, for what flash does not take."""
    count, length = starts.diff()[:, None], to.diff()[:, None]
    query, position = torch.arange(max_count, device=q.device), torch.arange(max_end, device=q.device)
    queries = q[(starts[:-1, None] + query).clamp(max=q.shape[0] - 1)]
    inside = position < length
    at = torch.where(inside, to[:-1, None] + position, 0)
    keys, values = (x[at].masked_fill(~inside[..., None, None], 0).transpose(1, 2) for x in (key, value))
    mask = position <= (length - count + query)[..., None]
    padded = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, mask[:, None], scale=scale, enable_gqa=q.shape[1] != key.shape[1])
    token = torch.arange(q.shape[0], device=q.device)
    row = (torch.searchsorted(starts, token, right=True) - 1).clamp(0, len(count) - 1)
    return padded[row, :, (token - starts[row]).clamp(0, max_count - 1)]


def _has_flash(q: Tensor) -> bool:
    return (q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
            and torch.backends.cuda.is_flash_attention_available())


def _check(k: Tensor, v: Tensor, cache: Tensor, layout: PagedLayout) -> None:
    if k.shape != v.shape or (k.shape[1], layout.record_bytes) != cache.shape[1:]:
        raise ShapeError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit a cache {tuple(cache.shape)}; valid: "
                         f"equal shapes [tokens, heads, head_dim] and a cache [blocks, heads, {layout.record_bytes}]")
    check_blocks(cache, layout)
