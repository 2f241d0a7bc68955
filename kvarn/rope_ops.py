"""kvarn::rope_append_paged: a step's rotary embedding and the append of its keys and values (kvarn/paged.py) in one op.

Nothing is changed but the cache. q and k leave roped, as new tensors, because both have readers: attention reads every
roped q, and of a prompt the roped k too (its own tokens are attended unrounded). A caller whose q and k are slices of
one projection therefore needs no copy to keep the projection as it was.

On a GPU a step of decodes is one launch, which also rounds the tiles that it fills. Where a row may bring a whole tile,
RoPE is a launch before the append's own, whose programs round tiles from keys that other programs rope.
"""

import torch
from torch import Tensor

from kvarn.errors import ShapeError
from kvarn.paged import append_paged_cpu
from kvarn.paged_layout import paged_layout

lib = torch.library.Library("kvarn", "FRAGMENT")

lib.define("rope_append_paged(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor angles, bool neox, "
           "Tensor(a!) cache, Tensor table, Tensor starts, Tensor ends, Tensor balance, SymInt max_count, str spec) "
           "-> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))


def rope(x: Tensor, positions: Tensor, angles: Tensor, neox: bool) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), computed in float32.

    Args:
        x: [n, H, D].
        positions: [n] integers.
        angles: [positions, R], R <= D even: cos of every pair of channels, then sin of every pair.
        neox: pairs are (i, i + R / 2), as in GPT-NeoX and Llama; else (2 i, 2 i + 1), as in GPT-J.

    Returns:
        [n, H, D] contiguous in x's dtype; channels from R on are x's.
    """
    rotary = angles.shape[1]
    cos, sin = angles[positions].float()[:, None].chunk(2, -1)
    turned = x[..., :rotary].float()
    a, b = turned.chunk(2, -1) if neox else (turned[..., ::2], turned[..., 1::2])
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.cat(pair, -1) if neox else torch.stack(pair, -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., rotary:]], -1)


def rope_append_paged_cpu(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, angles: Tensor, neox: bool, cache: Tensor,
                          table: Tensor, starts: Tensor, ends: Tensor, balance: Tensor, max_count: int,
                          spec: str) -> tuple[Tensor, Tensor]:
    """Rope a step's q and k, and store k and v.

    Args:
        q, k: [n, Hq, D], [n, H, D] in the model's dtype, not roped; v: [n, H, D].
        positions: [n] int64: where RoPE says the tokens are, which need not be where the cache has them.
        angles, neox: as in rope.
        cache, table, starts, ends, balance, spec: as in append_paged.
        max_count: the most new tokens of a row, or more: a launcher must not wait for the device.

    Returns:
        q, k roped, [n, Hq, D] and [n, H, D], contiguous.

    Raises:
        ShapeError: if q, k, v, positions and angles do not fit each other and the cache.
    """
    _check(q, k, positions, angles)
    q, k = rope(q, positions, angles, neox), rope(k, positions, angles, neox)
    append_paged_cpu(k, v, cache, table, starts, ends, balance, spec)
    return q, k


def rope_append_paged_cuda(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, angles: Tensor, neox: bool,
                           cache: Tensor, table: Tensor, starts: Tensor, ends: Tensor, balance: Tensor, max_count: int,
                           spec: str) -> tuple[Tensor, Tensor]:
    """The same on a GPU; angles beyond the table's end are read, not refused.

    Raises:
        ShapeError: as above.
        SpecError: for a preset no kernel exists for.
    """
    from kvarn.device import capability, channels_last, kernel_offsets, processors  # these need Triton
    from kvarn.kernels import configs, rope_append
    from kvarn.paged_cuda import _check as check_cache
    from kvarn.paged_cuda import append_paged_cuda

    _check(q, k, positions, angles)
    layout = paged_layout(spec, k.shape[-1], k.dtype)
    check_cache(k, v, cache, layout)
    q, k, v, angles = (channels_last(x) for x in (q, k, v, angles))
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    if k.shape[0] == 0:
        return q_out, k_out
    where = (cache, table, starts, ends, balance)
    with torch.cuda.device_of(q):
        if layout.spec.method == "raw" or max_count >= layout.spec.group or table.shape[0] == 0:
            rope_append.rope(q, k, q_out, k_out, positions, angles, neox)
            append_paged_cuda(k_out, v, *where, spec)
            return q_out, k_out
        per = configs.rows_per_look(table.shape[0], k.shape[1], processors(k.device))
        warps = configs.leave(layout.head_dim, layout.spec.group, capability(k.device))
        rope_append.append(q, k, v, q_out, k_out, positions, angles, neox, *where, per, warps, layout.page,
                           layout.spare, **kernel_offsets(layout))
    return q_out, k_out


def _check(q: Tensor, k: Tensor, positions: Tensor, angles: Tensor) -> None:
    dim = k.shape[-1]
    if q.shape != (k.shape[0], q.shape[1], dim) or positions.shape != k.shape[:1]:
        raise ShapeError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, positions {tuple(positions.shape)}; valid: [n, Hq, "
                         "D], [n, H, D] and [n]")
    if angles.dim() != 2 or angles.shape[1] % 2 or not 0 < angles.shape[1] <= dim:
        raise ShapeError(f"angles {tuple(angles.shape)}; valid: [positions, R], R even and at most {dim}")


def _fake(q, k, v, positions, angles, neox, cache, table, starts, ends, balance, max_count, spec):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))


lib.impl("rope_append_paged", rope_append_paged_cpu, "CPU")
lib.impl("rope_append_paged", rope_append_paged_cuda, "CUDA")
torch.library.register_fake("kvarn::rope_append_paged", _fake, lib=lib)
