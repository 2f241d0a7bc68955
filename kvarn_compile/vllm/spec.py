"""vLLM's view of a packed cache: one block is one tile, and a sequence takes a few blocks more for its open tile.

Importing this module registers the spec, so that unpickling one in another process does too.
"""

from dataclasses import dataclass, replace

import torch
from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvarn.paged_layout import PagedLayout, paged_layout
from kvarn.spec import QuantSpec, preset_name

logger = init_logger("vllm.kvarn")


@dataclass(frozen=True, kw_only=True)
class TileSpec(FullAttentionSpec):
    """The KV cache of one layer in tiles: a block is [KV heads, record_bytes] uint8 (kvarn/paged_layout.py).

    Attributes:
        key: QuantSpec.key.
        model_dtype: dtype of the keys and values that are packed.
    """

    key: str
    model_dtype: torch.dtype

    @staticmethod
    def of(stock: AttentionSpec, spec: QuantSpec, model_dtype: torch.dtype, page_bytes: int | None) -> "TileSpec":
        """In place of vLLM's own spec of the same layer; a block is padded to `page_bytes`, if given."""
        layout = paged_layout(spec.key, stock.head_size, model_dtype)
        return TileSpec(block_size=stock.block_size, num_kv_heads=stock.num_kv_heads, head_size=stock.head_size,
                        dtype=torch.uint8, num_head_slots=stock.num_kv_heads, state_content_bytes=layout.record_bytes,
                        tokens_per_state=spec.group, page_size_padded=page_bytes, key=spec.key, model_dtype=model_dtype)

    @property
    def layout(self) -> PagedLayout:
        """Where the bytes of a block lie."""
        return paged_layout(self.key, self.head_size, self.model_dtype)

    def max_num_blocks_per_req(self, vllm_config, max_len: int) -> int:
        """Entries of a block table row for `max_len` tokens, the open tile's included."""
        return self.layout.blocks(max_len)

    def max_memory_usage_bytes(self, vllm_config) -> int:
        """Bytes of one sequence of max_model_len tokens, the open tile's included."""
        return self.layout.blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list["TileSpec"]) -> "TileSpec":
        """The spec of a group of layers, which must agree; vLLM's own merge would drop our fields."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of one KV cache group must have the same packed format")  # vLLM catches this
        return replace(specs[0])


class TileManager(FullAttentionManager):
    """Blocks of sequences as for full attention, `spare` more each. Only tiles are hashed, never the open one."""

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: TileSpec, *args, **kwargs):
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._spare_tokens = kv_cache_spec.layout.spare * self.block_size
        self._log(kv_cache_spec, self.block_pool.num_gpu_blocks)

    @staticmethod
    def _log(spec: TileSpec, blocks: int) -> None:
        layout, group, dtype = spec.layout, spec.layout.spec.group, spec.model_dtype
        plain = 2 * spec.num_kv_heads * spec.head_size * dtype.itemsize * group
        logger.info("kvarn: preset %s, block size %d. KV cache: %s tokens in packed tiles, %.2fx of %s; each sequence "
                    "takes %d of %s blocks for its unfinished tile.", preset_name(layout.spec), group,
                    f"{blocks * group:,}", plain / spec.page_size_bytes, str(dtype).removeprefix("torch."),
                    layout.spare, f"{blocks:,}")

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args, **kwargs) -> int:
        """Blocks still missing for `num_tokens` tokens and the open tile."""
        return super().get_num_blocks_to_allocate(request_id, num_tokens + self._spare_tokens, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args, **kwargs) -> list:
        """Allocate them."""
        return super().allocate_new_blocks(request_id, num_tokens + self._spare_tokens, *args, **kwargs)

    def _cache_partial_tail_block(self, request, num_tokens: int) -> None:
        """An open tile has no block of its own to share."""


KVCacheSpecRegistry._ensure_registered()  # the registry skips vLLM's own specs once it holds any
KVCacheSpecRegistry.register(TileSpec, TileManager, uniform_type_base_spec=TileSpec)
