"""Every kernel that serving can meet, compiled in vLLM's profile run instead of in the first request.

The ops run on a cache of one block, which every row of the block table names: what they compute is of no account, which
kernels they compile and how much scratch they take is. CUDA graphs, captured later, meet the same kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvarn.paged import unpacked_starts
from kvarn.paged_layout import PagedLayout
from kvarn_compile.vllm.limits import decode_tokens, scratch_tokens, tokens_beyond
from kvarn_compile.vllm.metadata import Prompts
from kvarn_compile.vllm.prompts import Flash


@dataclass(frozen=True)
class Shape:
    """What a layer's launches depend on.

    Attributes:
        layout: of its blocks.
        heads, kv_heads, scale: of its attention, on this rank.
        rows, tokens: the most of a step.
        length: the most tokens of a row.
        decode: the most new tokens of a decode, of a draft model's too.
        scratch: the most keys that are unpacked together.
    """

    layout: PagedLayout
    heads: int
    kv_heads: int
    scale: float
    rows: int
    tokens: int
    length: int
    decode: int
    scratch: int

    @staticmethod
    def of(config, layout: PagedLayout, heads: int, kv_heads: int, scale: float) -> "Shape":
        """Of a layer in an engine of this VllmConfig."""
        scheduler = config.scheduler_config
        return Shape(layout, heads, kv_heads, scale, scheduler.max_num_seqs, scheduler.max_num_batched_tokens,
                     config.model_config.max_model_len,
                     decode_tokens(config, heads // kv_heads, tokens_beyond(config)), scratch_tokens(config))


@dataclass(frozen=True)
class Step:
    """Rows of equal numbers of new tokens and equal lengths."""

    rows: int
    count: int
    end: int


def decodes(shape: Shape) -> list[Step]:
    """Batches of every power of two and the largest, of rows that are short and of rows as long as can be."""
    counts = range(1, min(shape.decode, shape.length) + 1)
    return [Step(rows, count, end) for rows in [*_powers(shape.rows), shape.rows] for count in counts
            for end in sorted({count, shape.length})]


def prompts(shape: Shape) -> list[Step]:
    """Chunks that open, fill and close tiles, with and without history, of one row and of two; and the most scratch."""
    group, most = shape.layout.spec.group, min(shape.tokens, shape.length)
    counts = sorted({min(count, most) for count in (shape.decode + 1, group - 1, group, 2 * group + 3, most)})
    steps = [Step(rows, count, end) for count in counts for rows in (1, 2)
             for end in sorted({count, min(count + group + 1, shape.length)})]
    rows = min(-(-shape.scratch // shape.length), shape.rows, shape.tokens)
    end = min(shape.length, shape.scratch // rows)
    steps.append(Step(rows, min(end, shape.tokens // rows), end))
    return [step for step in steps if step.rows * step.count <= shape.tokens and step.rows <= shape.rows]


@lru_cache(maxsize=16)
def compile_kernels(engine: str, shape: Shape, flash: Flash | None, device: torch.device) -> None:
    """Run every step once: an engine's first layer of a shape does, the others find it done. Another engine
    (VllmConfig.instance_id) runs them again: compiled they are, but its own profile run has to see the scratch.
    """
    layout = shape.layout
    block = torch.zeros(1, shape.kv_heads, layout.record_bytes, dtype=torch.uint8, device=device)
    balance = torch.ones(shape.kv_heads, layout.head_dim, device=device)
    for step in decodes(shape):
        _run(step, shape, block, balance, None)
    for step in prompts(shape):
        _run(step, shape, block, balance, flash)


@lru_cache(maxsize=16)
def compile_rope(shape: Shape, rotary: int, dtype: torch.dtype, neox: bool, device: torch.device) -> None:
    """The same for kvarn::rope_append_paged, with angles [positions, rotary] of this dtype."""
    layout = shape.layout
    block = torch.zeros(1, shape.kv_heads, layout.record_bytes, dtype=torch.uint8, device=device)
    balance = torch.ones(shape.kv_heads, layout.head_dim, device=device)
    angles = torch.zeros(1, rotary, dtype=dtype, device=device)
    for step in [*decodes(shape), *prompts(shape)]:
        qkv, where = _inputs(step, shape, device)
        positions = torch.zeros(len(qkv[0]), dtype=torch.int64, device=device)
        torch.ops.kvarn.rope_append_paged(*qkv, positions, angles, neox, block, *where, balance, step.count,
                                          layout.spec.key)


def _run(step: Step, shape: Shape, block: Tensor, balance: Tensor, flash: Flash | None) -> None:
    """Append and attend, with q, k, v as slices of one projection, as models make them."""
    spec, (q, k, v), (table, starts, ends) = shape.layout.spec.key, *_inputs(step, shape, block.device)
    torch.ops.kvarn.append_paged(k, v, block, table, starts, ends, balance, spec)
    if flash is None:
        torch.ops.kvarn.attend_paged(q, k, v, block, table, starts, ends, balance, step.count, step.end, shape.scale,
                                     spec)
    else:
        rows = Prompts(slice(0, len(q)), table, starts, ends, step.count, step.end, step.rows * step.end,
                       None if step.count == step.end else unpacked_starts(starts, ends))
        flash.attend(rows, q, k, v, block, balance, spec, torch.empty_like(q))


def _inputs(step: Step, shape: Shape, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """q, k, v; and table, starts, ends."""
    heads, kv_heads, options = shape.heads, shape.kv_heads, {"dtype": torch.int32, "device": device}
    qkv = torch.zeros(step.rows * step.count, heads + 2 * kv_heads, shape.layout.head_dim, dtype=shape.layout.dtype,
                      device=device)
    return qkv.split((heads, kv_heads, kv_heads), 1), (
        torch.zeros(step.rows, shape.layout.blocks(shape.length), **options),
        torch.arange(step.rows + 1, **options) * step.count, torch.full((step.rows,), step.end, **options))


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4, ... below `most`."""
    power = 1
    while power < most:
        yield power
        power *= 2
