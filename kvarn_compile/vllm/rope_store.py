"""kvarn::rope_store: what graph_pass.py puts in a graph. It finds the layer's cache and step, as vLLM's own ops do."""

from functools import lru_cache

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name, direct_register_custom_op

import kvarn.rope_ops  # noqa: F401  (defines the op)
from kvarn_compile.vllm.fusion import refuse_capture
from kvarn_compile.vllm.metadata import TileMetadata
from kvarn_compile.vllm.warmup import compile_rope

logger = init_logger("vllm.kvarn")
lib = torch.library.Library("kvarn", "FRAGMENT")


def rope_store(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, angles: Tensor, head_size: int, neox: bool,
               layer_name: LayerNameType) -> tuple[Tensor, Tensor, Tensor]:
    """Rope a step's query and key and write key and value into the layer's cache.

    Args:
        query, key, value: [n, ...], heads of head_size channels one after the other; positions [n].
        angles, neox: as in kvarn.rope_ops.rope.
        layer_name: the attention layer's.

    Returns:
        query and key roped, contiguous, of the same shapes; and an empty tensor, for who must wait for the write.

    Raises:
        KVarnError: in a CUDA graph without a step (a piecewise one).
    """
    step, layer, cache, _ = get_attention_context(_resolve_layer_name(layer_name))
    q, k, v = (x.reshape(x.shape[0], -1, head_size) for x in (query, key, value))
    impl = layer.impl
    if step is not None:
        q, k = torch.ops.kvarn.rope_append_paged(
            q, k, v, positions, angles, neox, cache.squeeze(2), step.table, step.starts, step.ends,
            impl.scales(layer, q.device), most_new_tokens(step), impl.layout.spec.key)
    else:  # vLLM's profile run, whose values nobody reads
        refuse_capture(query)
        _say(impl.engine)
        if query.is_cuda:
            compile_rope(impl.shape, angles.shape[1], angles.dtype, neox, query.device)
        q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))
    return q.view(query.shape), k.view(key.shape), query.new_empty(0)


@lru_cache(maxsize=16)
def _say(engine: str) -> None:
    """Once an engine. (The pass could not: vLLM's compile cache skips it.)"""
    logger.info("kvarn: RoPE and the cache write are one op.")


def _fake(query, key, value, positions, angles, head_size, neox, layer_name):
    q, k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key))
    return q, k, query.new_empty(0)


def most_new_tokens(step: TileMetadata) -> int:
    """The most new tokens of a row of the step, or more."""
    return max((rows.max_count for rows in (step.decodes, *step.prompts) if rows is not None), default=0)


direct_register_custom_op("rope_store", rope_store, fake_impl=_fake, target_lib=lib, tags=(torch.Tag.flexible_layout,))
