"""One attention layer over packed tiles."""

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

import kvarn.paged_ops  # noqa: F401  (defines the ops)
from kvarn.paged_layout import PagedLayout, paged_layout
from kvarn_compile.vllm.backend import Engine, KVarnBackend
from kvarn_compile.vllm.balance import layer_scale
from kvarn_compile.vllm.fusion import installed, refuse_capture
from kvarn_compile.vllm.metadata import Rows, TileMetadata
from kvarn_compile.vllm.prompts import Flash
from kvarn_compile.vllm.refusals import STOCK, Reason, Refusal, UnsupportedEngine, has_window
from kvarn_compile.vllm.settings import WEIGHTS, Settings
from kvarn_compile.vllm.warmup import Shape, compile_kernels

WINDOW_BLOCK = 32
"""Tokens of the smallest block that vLLM's own backends take, for layers with a window."""


class KVarnImpl(AttentionImpl[TileMetadata]):
    """Appends a step's keys and values to the layer's tiles and attends them: no state per request.

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
        self.kv_cache_dtype, self.engine = kv_cache_dtype, config.instance_id
        self.settings = Settings.of(config.additional_config)
        self.balance: Tensor | None = None
        self.may_write_apart, self.writes_apart = self.settings.fuse_rope and installed(config), False
        self.balances_from_weights = self.settings.spec.rotated and self.settings.balance == WEIGHTS
        dtype, page_bytes = config.model_config.dtype, None
        layout = paged_layout(self.settings.spec.key, head_size, dtype)
        if has_window(config):
            page_bytes = shared_page_bytes(self.num_kv_heads, layout)
            config.cache_config.skip_page_size_padded = page_bytes
        KVarnBackend.built_for = Engine(self.settings, dtype, page_bytes)
        self.layout = layout
        self.flash = Flash.of(head_size, dtype, self.scale)
        self.shape = Shape.of(config, layout, num_heads, self.num_kv_heads, self.scale)
        self.decode = _decode_kernel(config, layout)

    def forward(self, layer, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
                attn_metadata: TileMetadata | None, output: Tensor, output_scale=None,
                output_block_scale=None) -> Tensor:
        """Attention of query [n, Hq, D] into `output`; key, value [n, H, D]; kv_cache [blocks, H, 1, record_bytes].

        Without metadata this is vLLM's profile run, whose peak of memory the pool must leave room for: every kernel is
        compiled there, and runs once with its largest scratch.
        """
        balance = self.scales(layer, query.device)
        if attn_metadata is None:
            if query.is_cuda:
                compile_kernels(self.engine, self.shape, self.flash, query.device)
            return output.zero_()
        step, cache, spec = attn_metadata, kv_cache.squeeze(2), self.layout.spec.key
        if not self.writes_apart:
            self._append(step, key, value, cache, balance)
        # Outside CUDA graphs the host is what a small step waits for: every row is found by where it starts in the
        # step's tensors, as none of them is sliced or copied here.
        rows = step.decodes
        if rows is not None and self.decode is not None:
            self.decode(query, cache, rows.table, rows.starts, rows.ends, balance, rows.max_count, rows.max_end,
                        self.scale, self.layout, output)
        elif rows is not None:
            self._attend(rows, query, key, value, cache, balance, output)
        for part in step.prompts:
            if self.flash is None:
                self._attend(part, query, key, value, cache, balance, output)
            else:
                self.flash.attend(part, query, key, value, cache, balance, spec, output)
        return output

    def do_kv_cache_update(self, layer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """The write alone, where attention leaves it out (fusion.py). Addresses are the step's: slots have none of the
        unfinished tile's."""
        step = get_attention_context(layer.layer_name)[0]
        if step is None:
            return refuse_capture(key)
        self._append(step, key, value, kv_cache.squeeze(2), self.scales(layer, key.device))

    def scales(self, layer, device: torch.device) -> Tensor:
        """The layer's key scales [H, D] float32, made at first use."""
        if self.balance is None:
            self.balance = layer_scale(self.settings, layer.layer_name, self.num_kv_heads, self.head_size, device)
        return self.balance

    def _append(self, step: TileMetadata, key: Tensor, value: Tensor, cache: Tensor, balance: Tensor) -> None:
        torch.ops.kvarn.append_paged(key, value, cache, step.table, step.starts, step.ends, balance,
                                     self.layout.spec.key)

    def _attend(self, rows: Rows, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, balance: Tensor,
                output: Tensor) -> None:
        """Rows of the step by the op, which gives zeros for the other rows' tokens."""
        found = torch.ops.kvarn.attend_paged(query, key, value, cache, rows.table, rows.starts, rows.ends, balance,
                                             rows.max_count, rows.max_end, self.scale, self.layout.spec.key)
        output[rows.tokens] = found[rows.tokens]


def _decode_kernel(config, layout: PagedLayout):
    """kvarn.decode_cuda.decode_paged where it runs: a decode of at most limits.decode_tokens. Else None."""
    if config.device_config.device_type != "cuda" or not layout.spec.rotated:
        return None
    from kvarn.decode_cuda import decode_paged

    return decode_paged


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
