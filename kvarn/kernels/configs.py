"""Launch configurations: deterministic functions of shapes, with the measurement that chose them (docs/kernels.md)."""

from dataclasses import dataclass
from functools import lru_cache

from kvarn.layout import StoreLayout

HEAD_DIMS = (64, 128, 256)
"""Head dimensions the kernels take: a quarter of one is at least a matrix instruction's 16."""

BITS = (2, 4, 8)
"""Code widths the kernels take: those that divide a byte."""


@lru_cache(maxsize=64)
def offsets(layout: StoreLayout) -> dict[str, int]:
    """Every size and byte offset a kernel needs, by its constexpr's name. An absent field is at 0 and never read."""
    record, tail, spec = layout.record, layout.tail, layout.spec
    fields = ("k_codes", "v_codes", "scalars", "channel", "token", "w", "m", "exact", "exact_at")
    return {"G": spec.group, "Q": layout.head_dim // 4, "KB": spec.k_bits, "VB": spec.v_bits, "E": spec.exact_rows,
            "VW": layout.value_bits, "RECORD": layout.record_bytes, "TAIL": layout.tail_bytes,
            **{name.upper(): record[name].offset if name in record else 0 for name in fields},
            **{name.upper(): tail[name].offset for name in ("words", "k_scale", "v_scale")}}


WAVE_TILES = 15
"""Tiles a decode program should have before programs are made smaller for balance."""


@dataclass(frozen=True)
class DecodeConfig:
    """How decode_tiles runs: parts a row's records are split into, tokens a step, and compiler options."""

    splits: int
    step: int
    num_warps: int
    num_stages: int
    maxnreg: int | None


def decode(rows: int, heads: int, tiles: int, padded: int, layout: StoreLayout, processors: int) -> DecodeConfig:
    """The decode configuration for `rows` x `heads` KV heads of up to `tiles` tiles, `padded` queries each.

    Splits make one full wave of resident programs; two or four waves, which even out the end, where a program still has
    WAVE_TILES tiles to itself (docs/kernels.md, "Configurations").
    """
    warps = 4 if layout.head_dim == 256 or padded > 16 else 2
    wave = processors * (8 // warps)
    waves = next((w for w in (4, 2) if tiles * rows * heads >= WAVE_TILES * w * wave), 1)
    return DecodeConfig(max(1, min(tiles, waves * wave // (rows * heads))), layout.spec.group, warps, 3, None)


def close(head_dim: int) -> tuple[int, int | None]:
    """Warps and register limit of the kernel that rounds a tile: those that spill nothing at head_dim 64 and 128.

    A limit of 128 registers at head_dim 128 is faster in spite of spills (benchmarks/results/write.csv).
    """
    return {64: (4, None), 128: (8, None), 256: (16, None)}[head_dim]


def unpack(head_dim: int) -> tuple[int, int]:
    """Tokens and warps of a program that unpacks."""
    return (64, 4) if head_dim < 256 else (32, 4)
