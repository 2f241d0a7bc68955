"""What a step's attention needs to know: its decodes and its prompts, apart.

Decided on the host: vLLM keeps every row's new tokens there and, for prompts, its exact length. Nothing waits for the
device.
The tensors are vLLM's own persistent ones, or made from them on the device, so that a step of decodes can be captured
in a CUDA graph.
"""

from dataclasses import dataclass
from itertools import pairwise
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

from kvarn.paged import unpacked_starts
from kvarn_compile.vllm.limits import DRAFT, decode_tokens, heads_per_kv_head, scratch_tokens, tokens_beyond
from kvarn_compile.vllm.spec import TileSpec


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a step, for one call of attend_paged (kvarn/paged.py).

    Attributes:
        tokens: where their tokens are in the step's.
        table: [b, N] int32, starts: [b + 1] int32, ends: [b] int32: parts of the step's.
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
        keys: how many they attend in all, or more.
        key_starts: unpacked_starts of the rows; None if the new tokens are all there is of every row, so that nothing
            is read back.
    """

    keys: int
    key_starts: Tensor | None


@dataclass(frozen=True)
class TileMetadata(AttentionMetadata):
    """A step.

    Attributes:
        table, starts, ends: of all rows, as append_paged takes them.
        decodes: the rows with few new tokens, which come first.
        prompts: the others, in parts that may be unpacked together.
    """

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
        prompts = tuple(self._prompts(m, rows)) if rows < m.num_reqs else ()
        return TileMetadata(m.block_table_tensor, m.query_start_loc, m.seq_lens, decodes, prompts)

    def _prompts(self, m: CommonAttentionMetadata, first: int):
        """The rows from `first` on, in parts: all that are fresh so far, or rows times the longest are bounded, which
        any one row is."""
        starts, ends = m.query_start_loc_cpu.tolist(), [end + self._beyond for end in _host_lengths(m)]
        counts = [end - start for start, end in pairwise(starts)]
        while first < m.num_reqs:
            last, longest, fresh = first + 1, ends[first], counts[first] == ends[first]
            while last < m.num_reqs:
                longer, still = max(longest, ends[last]), fresh and counts[last] == ends[last]
                if not still and (last + 1 - first) * longer > self._scratch_tokens:
                    break
                last, longest, fresh = last + 1, longer, still
            where = m.query_start_loc[first : last + 1], m.seq_lens[first:last]
            yield Prompts(slice(starts[first], starts[last]), m.block_table_tensor[first:last], *where,
                          max(counts[first:last]), longest, sum(ends[first:last]),
                          None if fresh else unpacked_starts(*where))
            first = last


def _host_lengths(m: CommonAttentionMetadata) -> list[int]:
    """Every row's length, from the host's memory: exact for prompts (vLLM's promise), for decodes an upper bound."""
    assert m.seq_lens_cpu_upper_bound is not None, "this vLLM keeps no lengths on the host"
    return m.seq_lens_cpu_upper_bound.tolist()
