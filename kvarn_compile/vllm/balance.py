"""Balanced keys: a layer's scale from the file that `kvarn balance` writes, the same on every rank and restart."""

from functools import lru_cache

import torch
from safetensors.torch import load_file
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index

from kvarn.errors import SpecError
from kvarn.frame import unit_balance
from kvarn_compile.vllm.settings import Settings


def check(settings: Settings, config) -> None:
    """Refuse a file that does not fit the model, before any weight is loaded.

    Raises:
        SpecError: if the file cannot be read or lacks the scale of a packed layer.
    """
    if settings.balance == "off":
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
    """The scale [heads, head_dim] float32 of this rank's KV heads of a layer; ones without a file."""
    if settings.balance == "off" or not settings.spec.rotated:
        return unit_balance(heads, head_dim, device)
    scale = _read(settings.balance)[f"layers.{extract_layer_index(layer_name)}"]
    first = get_tensor_model_parallel_rank() * scale.shape[0] // get_tensor_model_parallel_world_size()
    return scale[first : first + heads].to(device, torch.float32)


@lru_cache(maxsize=1)
def _read(path: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"balance={path!r} cannot be read: {error}; valid: 'off' or a safetensors file") from error
