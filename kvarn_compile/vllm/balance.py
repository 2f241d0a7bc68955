"""Balanced keys: each layer's scale, from the weights or from the file that `kvarn balance` writes.

Nothing is drawn at random: every restart has the same. A rank computes those of its own KV heads; where ranks share a
KV head, each from its own queries, with which alone it attends.
"""

from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.utils import extract_layer_index

from kvarn.balance import from_weights
from kvarn.errors import SpecError
from kvarn.frame import unit_balance
from kvarn_compile.vllm.limits import DRAFT
from kvarn_compile.vllm.settings import OFF, WEIGHTS, Settings

logger = init_logger("vllm.kvarn")


def check(settings: Settings, config) -> None:
    """Refuse a file that does not fit the model, before any weight is loaded.

    Raises:
        SpecError: if the file cannot be read or lacks the scale of a packed layer.
    """
    if settings.balance in (OFF, WEIGHTS):
        return
    model, scales = config.model_config, _read(settings.balance)
    shape = (model.get_total_num_kv_heads(), model.get_head_size())
    kinds = getattr(model.hf_text_config, "layer_types", None)
    for index, kind in enumerate(kinds or ["full_attention"] * model.get_total_num_hidden_layers()):
        scale = scales.get(f"layers.{index}")
        if kind == "full_attention" and (scale is None or scale.shape != shape):
            raise SpecError(f"balance={settings.balance!r} has no scale layers.{index} of {shape[0]} KV heads and "
                            f"{shape[1]} channels; write the file from this model with `kvarn balance`")


def layer_scale(settings: Settings, layer_name: str, heads: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """The scale [heads, head_dim] float32 of this rank's KV heads of a layer, from the file; ones without one, and for
    a draft model, which the file is not of."""
    if settings.balance in (OFF, WEIGHTS) or not settings.spec.rotated or layer_name.startswith(DRAFT):
        return unit_balance(heads, head_dim, device)
    scale = _read(settings.balance)[f"layers.{extract_layer_index(layer_name)}"]
    first = get_tensor_model_parallel_rank() * scale.shape[0] // get_tensor_model_parallel_world_size()
    return scale[first : first + heads].to(device, torch.float32)


def balance_from_weights(model: nn.Module) -> None:
    """Give every packed layer behind a key projection with a bias its scale; a rank's own KV heads are all it needs.

    Called between the loading of the weights and their repacking. Layers without a bias, and with balance "off" or from
    a file, keep what they have.
    """
    modules, done, unread = dict(model.named_modules()), 0, set()
    for name, module in modules.items():
        attention: Any = getattr(module, "attn", None)
        projection: Any = getattr(module, "qkv_proj", None)
        if not isinstance(attention, Attention) or getattr(projection, "bias", None) is None:
            continue
        if not getattr(attention.impl, "balances_from_weights", False):
            continue  # off, from a file, or a layer with a window, which is not ours
        reason = _unreadable(module, projection, attention)
        if reason:
            unread.add(reason)
            continue
        norm = modules.get(f"{name.rpartition('.')[0]}.input_layernorm")
        attention.impl.balance = _scale(module.rotary_emb, projection, attention, norm)
        done += 1
    if done:
        logger.info_once(f"kvarn: keys of {done} layers are balanced by their projections' weights.")
    if unread:
        logger.warning_once(f"kvarn: keys of some layers have a bias but are not balanced, as "
                            f"{', '.join(sorted(unread))}; make a file with `kvarn balance`.")


def _unreadable(module: nn.Module, projection, attention: Attention) -> str | None:
    """Why a layer's scale cannot be computed from its weights, if so."""
    rotary = getattr(module, "rotary_emb", None)
    if not isinstance(projection.quant_method, UnquantizedLinearMethod):
        return "its projection is quantized"
    if hasattr(module, "k_norm"):
        return "a norm follows its projection"
    if not getattr(rotary, "is_neox_style", False) or rotary.rotary_dim != attention.head_size:  # pyright: ignore
        return "its rotary embedding does not pair channel j with j + D/2"
    return None


def _scale(rotary, projection, attention, norm: nn.Module | None) -> torch.Tensor:
    """[KV heads, D] float32: kvarn/balance.py on the projection's rows of queries and keys."""
    sizes = [attention.num_heads * attention.head_size, attention.num_kv_heads * attention.head_size]
    query, key = projection.weight.data[: sum(sizes)].split(sizes)
    query_bias, key_bias = projection.bias.data[: sum(sizes)].split(sizes)
    cos, sin = rotary.cos_sin_cache[1].float().chunk(2)
    angle = torch.atan2(sin, cos).to(key.device)  # a rotation of one position; no more than 1 in any RoPE
    return from_weights(key, key_bias, getattr(norm, "weight", None), angle, attention.impl.settings.spec.group, query,
                        query_bias)


@lru_cache(maxsize=1)
def _read(path: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"balance={path!r} cannot be read: {error}; valid: {WEIGHTS!r}, {OFF!r} or a safetensors "
                        "file") from error
