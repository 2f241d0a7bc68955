"""transformers: a static cache without memory, cache layers that know their store, and generate() on a compiled model.

What works (transformers 5; hf_models.py, which loads models, and eval/hf.py import it too):

    model = torch.compile(model, backend="kvarn");  model.generate(..., cache_implementation="static")
    model.compile(backend="kvarn");                 model.generate(..., cache_implementation="static")
    model.generate(..., cache_implementation="static", compile_config=CompileConfig(backend="kvarn"))    (GPU)
    a decode loop of your own over model(ids, cache=cache)    (past_key_values=cache in older releases)

In the first two forms the cache that generate() makes never has memory of its own. In the third the prompt runs
uncompiled and fills a plain cache, which the first compiled step packs. A loop of your own should start with
`empty_static_cache`: a cache whose tensors are made inside a compiled prompt is plain until the next call, and where
mode="reduce-overhead" makes them outputs of a CUDA graph they cannot be packed.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation import GenerationMixin

from kvarn.errors import ShapeError
from kvarn_compile.binding import Binding, binding_of, release
from kvarn_compile.optimized import compiled_by_kvarn
from kvarn_compile.storage import empty_cache, has_memory, materialize


def empty_static_cache(config: PreTrainedConfig, batch: int, max_len: int, dtype: torch.dtype = torch.float16,
                       device: torch.device | str = "cpu") -> StaticCache:
    """A transformers StaticCache whose full-attention layers take no memory until they are packed.

    Args:
        config: the model's config.
        batch: rows.
        max_len: positions.
        dtype, device: of the model's keys and values.

    Raises:
        ShapeError: for a model whose layers do not all have the same KV heads and one head_dim for keys and values.
    """
    install()
    shape = _heads_and_dim(config)
    if shape is None:
        raise ShapeError("empty_static_cache: layers differ in KV heads, or keys and values in head_dim; "
                         "use transformers' StaticCache(config=..., max_cache_len=...)")
    cache = StaticCache(config=config, max_cache_len=max_len)
    _initialize(cache, batch, *shape, dtype, torch.device(device))
    return cache


def _heads_and_dim(config: PreTrainedConfig) -> tuple[int, int] | None:
    """KV heads and head_dim of every layer's keys and values, None if they differ."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if not isinstance(heads, int) or not isinstance(dim, int) or getattr(text, "v_head_dim", dim) != dim:
        return None
    return heads, dim


def _initialize(cache: StaticCache, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Makes the tensors of a new cache: full attention's without memory, zeros for sliding windows, which are small."""
    for layer in cache.layers:
        if type(layer) is not StaticLayer:
            continue
        shape = batch, heads, layer.max_cache_len, dim
        layer.keys, layer.values = empty_cache(shape, dtype, device), empty_cache(shape, dtype, device)
        layer.cumulative_length = layer.cumulative_length.to(device)
        vars(layer).update(device=layer.keys.device, dtype=dtype, batch_size=batch, num_heads=heads, k_head_dim=dim,
                           v_head_dim=dim)
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            torch._dynamo.mark_static_address(tensor)
        layer.is_initialized = True
    cache.early_initialization(batch, heads, dim, dtype, device)  # the layers that are left


def install() -> None:
    """Makes transformers' static layers and generate() aware of packed caches. Doing it twice changes nothing."""
    if getattr(StaticLayer, "_kvarn_installed", False):
        return
    setattr(StaticLayer, "_kvarn_installed", True)  # noqa: B010  (no such attribute, says a type checker)
    for name, packed in (("update", _update), ("reset", _reset), ("reorder_cache", _reorder), ("offload", _offload)):
        setattr(StaticLayer, name, _aware(getattr(StaticLayer, name), packed))
    PreTrainedModel.get_compiled_call = _compiled_call(PreTrainedModel.get_compiled_call)
    generation: Any = GenerationMixin  # a mixin, whose methods a type checker binds to no class
    generation._prepare_static_cache = _prepared(generation._prepare_static_cache)


def _aware(plain: Callable[..., Any], packed: Callable[..., Any]) -> Callable[..., Any]:
    """A layer method that calls `packed` when a store owns the layer's content; compiled graphs see `plain` only."""

    @functools.wraps(plain)
    def method(self, *args, **kwargs):
        if not torch.compiler.is_compiling() and self.is_initialized:
            binding = binding_of(self.keys)
            if binding is not None or (packed is _reset and not has_memory(self.keys)):
                return packed(self, binding, *args, **kwargs)
            for tensor in (self.keys, self.values):
                materialize(tensor)
        return plain(self, *args, **kwargs)

    return method


def _update(layer: StaticLayer, binding: Binding, key: Tensor, value: Tensor, *args: Any,
            **kwargs: Any) -> tuple[Tensor, Tensor]:
    """An eager step on a packed layer: writes to the store, returns a plain copy that lives for this layer's step."""
    positions = torch.arange(key.shape[-2], device=key.device) + layer.cumulative_length
    layer.cumulative_length.add_(key.shape[-2])
    binding.store.append(key, value, positions)
    keys, values = binding.store.unpack()
    return keys.index_copy_(2, positions, key), values.index_copy_(2, positions, value)


def _reset(layer: StaticLayer, binding: Binding | None) -> None:
    if binding is not None:
        binding.store.reset()
    layer.cumulative_length.zero_()


def _reorder(layer: StaticLayer, binding: Binding, rows: Tensor) -> None:
    binding.store.reorder(rows.to(binding.store.lengths.device))


def _offload(layer: StaticLayer, binding: Binding) -> None:
    release(layer.keys)
    layer.offload()


def _compiled_call(plain: Callable[..., Any]) -> Callable[..., Any]:
    """get_compiled_call, which generate() uses for decoding: a model that kvarn compiled is not compiled again."""

    @functools.wraps(plain)
    def get_compiled_call(self, compile_config):
        return self.__call__ if compiled_by_kvarn(self._compiled_call_impl) else plain(self, compile_config)

    return get_compiled_call


def _prepared(plain: Callable[..., Any]) -> Callable[..., Any]:
    """_prepare_static_cache, which makes generate()'s cache: without memory, if kvarn compiled the model.

    Only where transformers itself could initialize it early, with the same shape.
    """
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def prepare_static_cache(self, *args, **kwargs):
        cache = plain(self, *args, **kwargs)
        shape = _heads_and_dim(self.config)
        if (type(cache) is StaticCache and compiled_by_kvarn(self._compiled_call_impl) and shape is not None
                and shape == self._get_static_cache_init_shape() and not torch.is_autocast_enabled(self.device.type)):
            rows = signature.bind(self, *args, **kwargs).arguments["batch_size"]
            _initialize(cache, rows, *shape, self.dtype, self.device)
        return cache

    return prepare_static_cache
