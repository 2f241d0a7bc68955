"""Launch configurations: deterministic functions of shapes, with the measurement that chose them (docs/kernels.md)."""

from dataclasses import dataclass
from functools import lru_cache

from kvarn.layout import StoreLayout
from kvarn.paged_layout import PagedLayout

HEAD_DIMS = (64, 128, 256)
"""Head dimensions the kernels take: a quarter of one is at least a matrix instruction's 16."""

BITS = (2, 4, 8)
"""Code widths the kernels take: those that divide a byte."""


def head_dims(k_bits: int) -> tuple[int, ...]:
    """Head dimensions the kernels take with keys of k_bits: a matrix product takes channels by sixteens, those of the
    lower or the upper bytes of a token's codes. All for widths that have no kernels anyway.
    """
    return tuple(dim for dim in HEAD_DIMS if k_bits not in BITS or dim * k_bits // 8 >= 32)


@lru_cache(maxsize=64)
def offsets(layout: StoreLayout) -> dict[str, int]:
    """Every size and byte offset a kernel needs, by its constexpr's name. An absent field is at 0 and never read."""
    record, tail, spec = layout.record, layout.tail, layout.spec
    fields = ("k_codes", "v_codes", "scalars", "channel", "token", "w", "m", "exact", "exact_at")
    return {"G": spec.group, "Q": layout.head_dim // 4, "KB": spec.k_bits, "VB": spec.v_bits, "E": spec.exact_rows,
            "VW": layout.value_bits, "RECORD": layout.record_bytes, "TAIL": layout.tail_bytes,
            **{name.upper(): record[name].offset if name in record else 0 for name in fields},
            **{name.upper(): tail[name].offset for name in ("words", "k_scale", "v_scale")}}


@lru_cache(maxsize=64)
def raw_offsets(layout: PagedLayout) -> dict[str, int]:
    """The same for a paged store of method "raw"."""
    record, page = layout.record, layout.tail
    return {"G": layout.spec.group, "K": record["k"].offset, "V": record["v"].offset, "K_PAGE": page["k"].offset,
            "V_PAGE": page["v"].offset, "PAGE": layout.page, "SPARE": layout.spare}


DECODE_ROWS = 64
"""Query rows (heads of a group times tokens) a decode takes; more tokens of a row are a chunk."""


@dataclass(frozen=True)
class DecodeConfig:
    """How decode_tiles runs.

    Attributes:
        splits: programs that share a KV head's tiles.
        block: query rows of a program, 8 or 16.
        step: tokens at a time.
        num_warps, num_stages, maxnreg: compiler options.
    """

    splits: int
    block: int
    step: int
    num_warps: int
    num_stages: int
    maxnreg: int | None


@lru_cache(maxsize=1024)
def decode(rows: int, heads: int, tiles: int, queries: int, layout: StoreLayout, processors: int) -> DecodeConfig:
    """The decode configuration for `rows` x `heads` KV heads of up to `tiles` tiles and `queries` query rows each.

    168 registers are three warps for each of a processor's four schedulers instead of two: what a warp waits for, the
    others work through, and that is worth a few spilled words at the seams (none in the loop over tiles, by the default
    preset). One warp has no other to wait for, but at head_dim 128 no room for its accumulators either.

    Codes leave the first operand's registers as the older matrix instructions have them: with four warps, sixteen query
    rows would make Triton take others (a warp group's), where they would be wrong.
    """
    block = 8 if queries <= 8 or layout.head_dim == 256 else 16
    warps, step, stages = {64: (1, 64, 3), 128: (2, 128, 3), 256: (2, 128, 2)}[layout.head_dim]
    maxnreg = 168 if layout.head_dim < 256 and block == 8 else None
    resident = processors * (65536 // ((maxnreg or 256) * 32 * warps))
    splits = best_splits(rows * heads * -(-queries // block), tiles, resident)
    return DecodeConfig(splits, block, min(step, layout.spec.group), warps, stages, maxnreg)


def best_splits(groups: int, tiles: int, resident: int) -> int:
    """Programs among which to share each group's tiles when `resident` programs run at once.

    Waves times what a program takes, which is 3 tiles beside its own; a wave that is partly full takes less: 0.36 of
    a full one's time and 0.64 of its share of it. The numbers fit what benchmarks/explore_decode.py measured.
    """
    def cost(splits: int) -> float:
        full, part = divmod(groups * splits, resident)
        return (tiles / splits + 3) * (full + (0.36 + 0.64 * part / resident if part else 0))

    candidates = {max(1, min(tiles, waves * resident // groups)) for waves in (1, 2, 3, 4)}
    return min(candidates, key=lambda splits: (cost(splits), splits))


def combine(parts: int, head_dim: int) -> tuple[int, int]:
    """Parts that combine_parts takes at a time, and its warps: most programs of a large batch have few."""
    if parts <= 8:
        return 8, 1
    return (4096 // head_dim, 2) if parts <= 4096 // head_dim else (16384 // head_dim, 4)


def fill(head_dim: int, group: int, capability: int) -> tuple[int, int | None]:
    """Warps and register limit of the kernels that round whole tiles: at head_dim 128 too few registers for a tile and
    what is made of it, so that three programs run at once and not two; at 64 two warps need no limit to be as fast as
    four with one.

    At most one warp for 16 tokens: with more, warps would have no tokens of their own (rotation.across_times).
    """
    warps, maxnreg = {64: (2, None), 128: (4, 168), 256: (8, None)}[head_dim]
    return min(warps, group // 16), maxnreg


def leave(head_dim: int, group: int, capability: int) -> int:
    """Warps of the kernels that round tiles of which a part is packed or in the tail already.

    At most as in fill. From sm_100 on 16: with fewer, products with tokens as rows go through tensor memory, and a
    compiler pass of Triton 3.7 for that fails.
    """
    return 16 if capability >= 100 else min({64: 4, 128: 8, 256: 8}[head_dim], group // 16)


ROWS_PER_LOOK = 8
"""The most rows whose open tiles one program looks after."""


def rows_per_look(rows: int, heads: int, processors: int) -> int:
    """Rows whose open tiles one program looks after when each gets a token: about as many programs as processors, as
    few of them find a full tile; but not too many, whose tiles may all be full at once.
    """
    return min(ROWS_PER_LOOK, -(-rows * heads // processors))


def unpack(head_dim: int) -> tuple[int, int]:
    """Tokens and warps of a program that unpacks."""
    return (64, 4) if head_dim < 256 else (32, 4)


def unpack_paged(head_dim: int) -> tuple[int, int]:
    """The same where every token has a page of its own to point to."""
    return (64, 4) if head_dim < 128 else (32, 4)


@dataclass(frozen=True)
class PrefillConfig:
    """How attend_chunk runs.

    Attributes:
        queries, keys: of a block.
        part: keys at a time where the mask is read: what a program holds of them comes on top of its result.
        num_warps, num_stages: compiler options.
        turns: whether two warp groups (sm_90, eight warps) take turns at the matrix units.
    """

    queries: int
    keys: int
    part: int
    num_warps: int
    num_stages: int
    turns: bool = False


def prefill(head_dim: int, capability: int) -> PrefillConfig:
    """The configuration of a chunk's attention. From sm_90 on a warp group takes 64 queries and a processor has shared
    memory for 128 and three stages of 128 keys and values of head_dim 128.
    """
    if 90 <= capability < 120:
        return {64: PrefillConfig(128, 128, 32, 8, 3), 128: PrefillConfig(128, 128, 32, 8, 3),
                256: PrefillConfig(128, 64, 16, 8, 2)}[head_dim]
    return {64: PrefillConfig(128, 64, 16, 8, 3), 128: PrefillConfig(128, 32, 16, 8, 3),
            256: PrefillConfig(64, 32, 16, 8, 2)}[head_dim]
