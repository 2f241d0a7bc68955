"""The evaluation's only door to transformers: loading a model, and running it over chunks with an attention of ours."""

import inspect
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvarn_compile.eval.session import Attends
from kvarn_compile.eval.shape import ModelShape

_ATTENTION = "kvarn_eval"


def load_model(name: str | Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model from a folder or the hub, in eval mode, its attention handed to `run_chunk`'s session."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return adopt(model.to(device).eval())


def adopt(model: Any) -> Any:
    """Make a loaded model's attention layers call the session that `run_chunk` passes them."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    model.set_attn_implementation(_ATTENTION)
    return model


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model folder or hub name."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def model_shape(model: Any) -> ModelShape:
    """Layers, heads and head_dim of a model's text decoder."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(config.num_hidden_layers, heads, config.num_key_value_heads, head_dim, config.vocab_size)


def projections(model: Any) -> list[tuple[Any, Any, Tensor | None]]:
    """Per layer: the key and the query projection and the weight of the norm before them, for models of that form."""
    found = []
    for layer in model.get_decoder().layers:
        norm = getattr(layer, "input_layernorm", None)
        found.append((layer.self_attn.k_proj, layer.self_attn.q_proj, getattr(norm, "weight", None)))
    return found


def rope_frequencies(model: Any) -> Tensor:
    """RoPE angle per position of each channel pair, [D / 2]."""
    return model.get_decoder().rotary_emb.inv_freq


def run_chunk(model: Any, ids: Tensor, start: int, session: Attends) -> Tensor:
    """Logits [B, n, vocabulary] of tokens ids [B, n] at positions start..start+n-1; attention is the session's."""
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    return model(input_ids=ids, position_ids=positions, use_cache=False, kvarn_session=session).logits


@contextmanager
def own_attention(model: Any):
    """The model with PyTorch's attention instead of a session's."""
    model.set_attn_implementation("sdpa")
    try:
        yield model
    finally:
        model.set_attn_implementation(_ATTENTION)


def static_cache(model: Any, rows: int, tokens: int) -> Any:
    """An empty static cache of `tokens` positions whose full-attention layers kvarn can own from the first step."""
    from kvarn_compile.hf import empty_static_cache

    return empty_static_cache(model.config, rows, tokens, model.dtype, model.device)


def run_cached(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of the next tokens ids [B, n] of the sequences in `cache`."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(input_ids=ids, use_cache=True, **{name: cache}).logits


def _attention(module, query, key, value, attention_mask, *, kvarn_session: Attends, scaling=None, sliding_window=None,
               **_):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = kvarn_session.attend(module.layer_idx, query, key, value, scale, sliding_window)
    return out.transpose(1, 2).contiguous(), None
