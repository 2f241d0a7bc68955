"""kvarn::append and kvarn::attend on a GPU: which kernels run, with what scratch. No host synchronization anywhere.

Semantics are the CPU implementations' (append.py, attention.py), with two differences a device imposes: a chunk's
positions must be consecutive in each row, and a position outside the capacity is not written (an exception would need a
synchronization); and one of few query tokens a row (decode_cuda.py). Every decision that depends on data is made on the
device, so that a step can be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from kvarn.decode_cuda import decode_limit, decode_store
from kvarn.device import assembly, capability, channels_last, kernel_offsets, on_own_device, processors
from kvarn.errors import ShapeError
from kvarn.kernels import append, blocks, configs, prefill, quantize, unpack
from kvarn.layout import store_layout
from kvarn.raw import append_raw, read_raw

SCRATCH_BYTES = 1 << 28
"""A chunk unpacks the cache of as many rows at a time as fit here (at least one)."""


@on_own_device
def append_cuda(k: Tensor, v: Tensor, positions: Tensor, records: Tensor, tail: Tensor, lengths: Tensor,
                balance: Tensor, capacity: int, spec: str) -> None:
    """Store k, v [B', H, n, D] at consecutive positions [n] or [B', n]; see kvarn/append.py.

    A device cannot raise: a position outside the store's tiles is not written (with method "raw", PyTorch's indexing
    fails on the device), and `capacity` is not looked at.

    Raises:
        ShapeError: if k, v or positions do not fit the store.
        SpecError: for a preset no kernel exists for.
    """
    layout = store_layout(spec, k.shape[-1], k.dtype)
    rows, tokens = k.shape[0], k.shape[2]
    _check_store(k, records, tail, lengths)
    if k.shape != v.shape or positions.shape[-1] != tokens:
        raise ShapeError(f"k {tuple(k.shape)}, v {tuple(v.shape)}, {positions.shape[-1]} positions; valid: equal "
                         "shapes [rows, heads, tokens, head_dim] and one position per token")
    if tokens == 0 or rows == 0:
        return
    if layout.spec.method == "raw":
        append_raw(k, v, positions.expand(rows, tokens), records[:rows], tail[:rows], lengths[:rows], layout)
        return
    offsets = kernel_offsets(layout)
    positions = channels_last(positions if positions.dim() == 2 else positions[None])
    k, v = channels_last(k), channels_last(v)
    before = torch.empty_like(lengths[:rows])
    per = configs.rows_per_look(rows, k.shape[1], processors(k.device)) if tokens == 1 else 1
    shape = layout.head_dim, layout.spec.group, capability(k.device)
    quantize.close(k, v, positions, records, tail, lengths, before, balance, per, configs.leave(*shape),
                   *configs.fill(*shape), assembly(k.device), **offsets)
    if tokens == 1:
        append.write(k, v, positions, records, tail, lengths, balance, num_warps=4, **offsets)
    else:
        append.open_(k, v, positions, records, tail, lengths, before, balance, num_warps=4, **offsets)


@on_own_device
def attend_cuda(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, records: Tensor, tail: Tensor, lengths: Tensor,
                balance: Tensor, mask: Tensor | None, kv_len: int, is_causal: bool, scale: float, spec: str) -> Tensor:
    """Attention of q [B', Hq, n, D] over the store after the append of k, v; see kvarn/attention.py.

    Up to decode_limit tokens read themselves back from the store, as one token does: nearly as they were from the open
    tile, rounded from a tile that one of them completed, where all later steps read them too. In a longer chunk, and
    with is_causal, they are attended as given. Under a mask a query that sees a token that is not finite gets NaN; what
    is hidden from it has no part in its result.

    Raises:
        ShapeError: if q does not fit the store.
        SpecError: for a preset no kernel exists for.
    """
    layout = store_layout(spec, q.shape[-1], q.dtype)
    rows, query_heads, tokens, _ = q.shape
    _check_store(k, records, tail, lengths)
    if query_heads % records.shape[1]:
        raise ShapeError(f"{query_heads} query heads over {records.shape[1]} KV heads; valid: a multiple")
    if is_causal:
        kv_len = min(kv_len, tokens)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if rows == 0 or tokens == 0 or kv_len == 0:
        return out.zero_()
    if mask is not None:
        mask = mask.expand(rows, query_heads, tokens, kv_len)
    if layout.spec.method == "raw":
        key, value = read_raw(records[:rows], tail[:rows], lengths[:rows], layout)
        return _sdpa(q, key[:, :, :kv_len], value[:, :, :kv_len], mask, is_causal, scale, out)
    if not is_causal and tokens <= decode_limit(query_heads // records.shape[1]):
        return decode_store(q, records, tail, lengths, balance, mask, kv_len, scale, layout, out)
    in_blocks = q.dtype != torch.float32 and scale > 0 and not is_causal
    positions = channels_last(positions if positions.dim() == 2 else positions[None])
    heads, dim = records.shape[1], layout.head_dim
    step = max(1, SCRATCH_BYTES // (2 * heads * kv_len * dim * q.element_size()))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        shape = (part.stop - start, heads, kv_len, dim)
        key, value = q.new_empty(shape), q.new_empty(shape)
        own = positions[part] if positions.shape[0] > 1 else positions
        unpack.unpack(channels_last(k[part]), channels_last(v[part]), own, records[part], tail[part], lengths[part],
                      balance, key, value, *configs.unpack(dim), **kernel_offsets(layout))
        if mask is not None and in_blocks:
            _masked(q[part], key, value, mask[part], scale, out[part])
        else:
            _sdpa(q[part], key, value, None if mask is None else mask[part], is_causal, scale, out[part])
    return out


def _masked(q: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, out: Tensor) -> Tensor:
    """Attention under a mask into `out`, in blocks of which the mask says which are needed (kernels/blocks.py)."""
    rows, query_heads, tokens, kv_len = mask.shape
    config = configs.prefill(q.shape[-1], capability(q.device))
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    unlike = mask[: 1 if mask.stride(0) == 0 else rows, : 1 if mask.stride(1) == 0 else query_heads]
    shape, steps = unlike.shape[:2], -(-kv_len // config.keys)
    sights = mask.new_empty((*shape, tokens, steps), dtype=torch.int8)
    parts = -(-tokens // config.queries)
    order, counts = (mask.new_empty((*shape, parts, size), dtype=torch.int32) for size in (steps, 2))
    blocks.list_seen(unlike, sights, order, counts, config.queries, config.keys)
    prefill.attend(channels_last(q), key, value, mask, order, counts, out, scale, config)
    return out


def _sdpa(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
          out: Tensor) -> Tensor:
    """PyTorch's attention into `out`. With a mask, one query head of each group at a time: no fused kernel takes both a
    mask and grouped heads, and the unfused one would hold all scores."""
    attention = torch.nn.functional.scaled_dot_product_attention
    group = q.shape[1] // key.shape[1]
    if mask is None or group == 1:
        out.copy_(attention(q, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=group > 1))
        return out
    if mask.dtype == torch.bool:  # else every call would make the same bias of it
        shared = mask[:, :1] if mask.stride(1) == 0 else mask
        mask = q.new_zeros(shared.shape).masked_fill_(~shared, -torch.inf).expand_as(mask)
    for i in range(group):
        out[:, i::group] = attention(q[:, i::group], key, value, mask[:, i::group], is_causal=is_causal, scale=scale)
    return out


def _check_store(k: Tensor, records: Tensor, tail: Tensor, lengths: Tensor) -> None:
    if k.shape[0] > records.shape[0] or k.shape[1] != records.shape[1]:
        raise ShapeError(f"{k.shape[0]} rows and {k.shape[1]} heads in a store of {records.shape[0]} rows and "
                         f"{records.shape[1]} heads; valid: at most as many rows, as many heads")
    if not (records.is_contiguous() and tail.is_contiguous() and lengths.is_contiguous()):
        raise ShapeError("a packed store's tensors must be contiguous on a GPU")
