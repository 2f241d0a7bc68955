"""One attention layer over packed tiles."""

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

import kvarn.paged_ops  # noqa: F401  (defines the ops)
from kvarn.paged_layout import PagedLayout, paged_layout
from kvarn_compile.vllm.backend import Engine, KVarnBackend, TileMetadata
from kvarn_compile.vllm.balance import layer_scale
from kvarn_compile.vllm.refusals import STOCK, Reason, Refusal, UnsupportedEngine, has_window
from kvarn_compile.vllm.settings import Settings

WINDOW_BLOCK = 32
"""Tokens of the smallest block that vLLM's own backends take, for layers with a window."""


class KVarnImpl(AttentionImpl[TileMetadata]):
    """Appends a step's keys and values to the layer's tiles and attends them: two ops, no state per request.

    Raises:
        UnsupportedEngine: for a layer whose attention the ops cannot express.
    """

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
                 alibi_slopes: list[float] | None = None, sliding_window: int | None = None,
                 kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
                 attn_type: str = AttentionType.DECODER, kv_sharing_target_layer_name: str | None = None, **extra):
        config = get_current_vllm_config()
        refused = list(_refusals(alibi_slopes, sliding_window, logits_soft_cap, attn_type, kv_sharing_target_layer_name,
                                 extra))
        if refused:
            raise UnsupportedEngine(refused)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.settings = Settings.of(config.additional_config)
        self.balance: torch.Tensor | None = None
        dtype, page_bytes = config.model_config.dtype, None
        if has_window(config):
            page_bytes = shared_page_bytes(self.num_kv_heads, paged_layout(self.settings.spec.key, head_size, dtype))
            config.cache_config.skip_page_size_padded = page_bytes
        KVarnBackend.built_for = Engine(self.settings, dtype, page_bytes)

    def forward(self, layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
                attn_metadata: TileMetadata | None, output: torch.Tensor, output_scale=None,
                output_block_scale=None) -> torch.Tensor:
        """Attention of query [n, Hq, D] into `output`; key, value [n, H, D]; kv_cache [blocks, H, 1, record_bytes]."""
        if self.balance is None:
            self.balance = layer_scale(self.settings, layer.layer_name, self.num_kv_heads, self.head_size, query.device)
        if attn_metadata is None:
            return output.zero_()
        step, cache = attn_metadata, kv_cache.squeeze(2)
        q, k, v = (x[: step.tokens] for x in (query, key, value))
        where = (cache, step.table, step.starts, step.ends, self.balance)
        torch.ops.kvarn.append_paged(k, v, *where, self.settings.spec.key)
        output[: step.tokens] = torch.ops.kvarn.attend_paged(q, k, v, *where, step.max_count, step.max_end, self.scale,
                                                             self.settings.spec.key)
        return output


def shared_page_bytes(heads: int, layout: PagedLayout) -> int:
    """A block's bytes in a pool that tiles share with plain blocks of layers with a window: the larger of the two.

    vLLM pads both to it, and gives the plain ones as many tokens as fit.
    """
    return heads * max(layout.record_bytes, WINDOW_BLOCK * 2 * layout.head_dim * layout.dtype.itemsize)


def _refusals(alibi_slopes, sliding_window, soft_cap, attn_type, sharing, extra):
    if alibi_slopes is not None or soft_cap or extra.get("sinks") is not None:
        yield Refusal(Reason.BIAS, "ALiBi slopes, soft caps and attention sinks change the scores", STOCK)
    if sliding_window is not None:
        yield Refusal(Reason.SLIDING_WINDOW, "a window over packed tiles is not implemented", STOCK)
    if attn_type != AttentionType.DECODER:
        yield Refusal(Reason.ENCODER, f"attention of type {attn_type}", STOCK)
    if sharing is not None:
        yield Refusal(Reason.KV_SHARING, f"a layer that reads the cache of {sharing}", STOCK)
