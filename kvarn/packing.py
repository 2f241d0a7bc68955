"""Planar packing of integer codes into bytes, along the last dimension.

With b = 1, 2, 4 or 8 bits a byte holds the codes of elements j, j + n, j + 2n, ... (n = elements * b / 8), lowest bits
first: each plane is one contiguous slice, so a kernel multiplies it without shuffling. 3 bits are packed as the low
two bits followed by the high one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] (any integer dtype, 0 <= code < 2^bits) to bytes [..., n * bits / 8] uint8."""
    codes, parts = codes.to(torch.uint8), []
    for width in _PARTS[bits]:
        planes = (codes & ((1 << width) - 1)).unflatten(-1, (8 // width, -1))
        packed = planes[..., 0, :].clone()
        for plane in range(1, 8 // width):
            packed |= planes[..., plane, :] << (plane * width)
        parts.append(packed)
        codes = codes >> width if width < 8 else codes
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def unpack(packed: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Bytes uint8 with n * bits / 8 entries along `dim` back to codes uint8 with n entries."""
    elements = packed.shape[dim] * 8 // bits
    codes, shift, start = None, 0, 0
    for width in _PARTS[bits]:
        length = elements * width // 8
        part = packed.narrow(dim, start, length)
        if width < 8:
            part = torch.cat([(part >> (i * width)) & ((1 << width) - 1) for i in range(8 // width)], dim)
        codes = part if codes is None else codes | (part << shift)
        shift, start = shift + width, start + length
    assert codes is not None
    return codes


def pack_keys(codes: Tensor, bits: int) -> Tensor:
    """Key codes [..., G, D] to the record's bytes [..., G, D * bits / 8]."""
    return exchange(pack(codes, bits))


def pack_values(codes: Tensor, bits: int) -> Tensor:
    """Value codes [..., G, D] to the record's bytes [..., D * bits / 8, G]."""
    return exchange(pack(codes, bits).transpose(-1, -2))


def unpack_keys(packed: Tensor, bits: int) -> Tensor:
    """The inverse of pack_keys, [..., G, D] uint8."""
    return unpack(exchange(packed), bits)


def unpack_values(packed: Tensor, bits: int) -> Tensor:
    """The inverse of pack_values, but transposed: [..., D, G] uint8."""
    return unpack(exchange(packed), bits, dim=-2)


def masked_planes(packed: Tensor, bits: int, dim: int) -> Iterator[tuple[Tensor, int, float]]:
    """Bytes taken apart without shifting: (bytes & mask, first element, factor) of each plane along `dim`.

    The codes of elements first.. are the sum of (bytes & mask) * factor over the planes that cover them. Bytes stay in
    the record's order, so a product over `dim` takes its other operand through `exchange`.
    """
    elements, shift, start = packed.shape[dim] * 8 // bits, 0, 0
    for width in _PARTS[bits]:
        length = elements * width // 8
        part = packed.narrow(dim, start, length)
        for plane in range(8 // width):
            mask = ((1 << width) - 1) << (plane * width)
            yield (part & mask if width < 8 else part), plane * length, 2.0 ** (shift - plane * width)
        shift, start = shift + width, start + length


def exchange(x: Tensor) -> Tensor:
    """x with entries 1 and 2 of every four along its last dimension exchanged (layout.py says why): its own inverse."""
    swapped = x.clone(memory_format=torch.contiguous_format)
    fours = x.shape[-1] // 4 * 4
    swapped[..., 1:fours:4], swapped[..., 2:fours:4] = x[..., 2:fours:4], x[..., 1:fours:4]
    return swapped
