"""What a step's attention needs to know: its decodes and its prompts, apart.

Decided on the host: vLLM keeps every row's new tokens there and, for prompts, its exact length. Nothing waits for the
device.
The tensors are vLLM's own persistent ones, or made from them on the device, so that a step of decodes can be captured
in a CUDA graph.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from kvarn_compile.vllm.limits import DRAFT, decode_tokens, heads_per_kv_head, scratch_tokens, tokens_beyond
from kvarn_compile.vllm.spec import TileSpec


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a step, for one call of attend_paged (kvarn/paged.py).

    Attributes:
        tokens: where their tokens are in the step's.
        table: [b, N] int32, starts: [b + 1] int32 from 0 on, ends: [b] int32.
        max_count, max_end: the most new tokens and the longest length of a row, or more.
    """

    tokens: slice
    table: Tensor
    starts: Tensor
    ends: Tensor
    max_count: int
    max_end: int


@dataclass(frozen=True)
class Prompts(Rows):
    """Rows of prompt tokens.

    Attributes:
        fresh: the new tokens are all there is of every row, so that nothing is read back.
    """

    fresh: bool


@dataclass(frozen=True)
class TileMetadata(AttentionMetadata):
    """A step.

    Attributes:
        tokens: its tokens, padding included.
        table, starts, ends: of all rows, as append_paged takes them.
        decodes: the rows with few new tokens, which come first.
        prompts: the others, in parts that may be unpacked together.
    """

    tokens: int
    table: Tensor
    starts: Tensor
    ends: Tensor
    decodes: Rows | None
    prompts: tuple[Prompts, ...]


class TileMetadataBuilder(AttentionMetadataBuilder[TileMetadata]):
    """Splits a step in two; every address is computed from vLLM's tensors inside the ops."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: TileSpec, layer_names: list[str], vllm_config, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._beyond = tokens_beyond(vllm_config) if all(name.startswith(DRAFT) for name in layer_names) else 0
        self._init_reorder_batch_threshold(
            decode_tokens(vllm_config, heads_per_kv_head(vllm_config, layer_names), self._beyond))
        self._scratch_tokens = scratch_tokens(vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Batches of decodes; those of a speculating engine too, if the decode kernel takes that many tokens of the
        target's layers: a draft model's steps are not captured."""
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        target = [name for name, layer in layers.items()
                  if not name.startswith(DRAFT) and layer.get_attn_backend().get_builder_cls() is cls]
        wanted = 1 + vllm_config.num_speculative_tokens
        if decode_tokens(vllm_config, heads_per_kv_head(vllm_config, target)) < wanted:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return cls._cudagraph_support

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata,
              fast_build: bool = False) -> TileMetadata:
        """The metadata of one step. While a CUDA graph is captured, vLLM's max_seq_len is max_model_len."""
        m, threshold = common_attn_metadata, self.reorder_batch_threshold or 1
        rows, _, tokens, _ = split_decodes_and_prefills(m, decode_threshold=threshold)
        decodes = None
        if rows:
            decodes = Rows(slice(0, tokens), m.block_table_tensor[:rows], m.query_start_loc[: rows + 1],
                           m.seq_lens[:rows], min(m.max_query_len, threshold), m.max_seq_len)
        return TileMetadata(m.num_actual_tokens, m.block_table_tensor, m.query_start_loc, m.seq_lens, decodes,
                            tuple(self._prompts(m, rows)))

    def _prompts(self, m: CommonAttentionMetadata, first: int):
        """The rows from `first` on, in parts: rows times the longest is bounded, which any one row is."""
        starts, ends = m.query_start_loc_cpu.tolist(), [end + self._beyond for end in _host_lengths(m)]
        while first < m.num_reqs:
            last, longest = first + 1, ends[first]
            while last < m.num_reqs and (last + 1 - first) * max(longest, ends[last]) <= self._scratch_tokens:
                longest = max(longest, ends[last])
                last += 1
            counts = [starts[i + 1] - starts[i] for i in range(first, last)]
            table, lengths = m.block_table_tensor[first:last], m.seq_lens[first:last]
            if first:  # Triton compiles again for a pointer that is no multiple of 16 bytes
                table, lengths = table.clone(), lengths.clone()
            begin = starts[first]
            yield Prompts(slice(begin, starts[last]), table, m.query_start_loc[first : last + 1] - begin, lengths,
                          max(counts), longest, counts == ends[first:last])
            first = last


def _host_lengths(m: CommonAttentionMetadata) -> list[int]:
    """Every row's length, from the host's memory: exact for prompts (vLLM's promise), for decodes an upper bound."""
    assert m.seq_lens_cpu_upper_bound is not None, "this vLLM keeps no lengths on the host"
    return m.seq_lens_cpu_upper_bound.tolist()
