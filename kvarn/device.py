"""What every launcher asks of a device or brings its tensors to."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from kvarn.errors import ShapeError, SpecError
from kvarn.kernels import configs
from kvarn.layout import ALIGN, StoreLayout
from kvarn.paged_layout import PagedLayout
from kvarn.spec import QuantSpec

P = ParamSpec("P")
R = TypeVar("R")


def on_own_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """A launcher with its first tensor's device as the current one: Triton launches there, whatever its arguments."""
    @wraps(launcher)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return launcher(*args, **kwargs)

    return run


def kernel_offsets(layout: StoreLayout) -> dict[str, int]:
    """configs.offsets of a layout.

    Raises:
        SpecError, ShapeError: if no kernels exist for it.
    """
    check_spec(layout.spec)
    check_head_dim(layout.head_dim, layout.spec)
    return configs.offsets(layout)


def check_spec(spec: QuantSpec) -> None:
    """Refuse a format without kernels.

    Raises:
        SpecError: if it is one.
    """
    if spec.method != "kvarn" or spec.tail_bits != 8 or spec.sink:
        raise SpecError(f"{spec.key} has no GPU kernels; valid there: method 'kvarn' with an 8-bit tail and no sink, "
                        "or 'k16v16'")
    if spec.k_bits not in configs.BITS or spec.v_bits not in configs.BITS:
        raise SpecError(f"{spec.key} has no GPU kernels; valid there: bits of {configs.BITS}")


def check_head_dim(head_dim: int, spec: QuantSpec) -> None:
    """Refuse a head dimension without kernels, of a store of a format that has any.

    Raises:
        ShapeError: if it is one.
    """
    valid = configs.head_dims(spec.k_bits)
    if head_dim not in valid:
        raise ShapeError(f"head_dim={head_dim} has no GPU kernels for keys of {spec.k_bits} bits; valid there: {valid}")


def check_blocks(cache: Tensor, layout: PagedLayout) -> None:
    """Refuse a paged cache [blocks, H, record_bytes] that kernels would misread.

    Raises:
        ShapeError: if its records are of another size, not dense or not aligned.
    """
    if cache.dim() != 3 or cache.shape[2] != layout.record_bytes:
        raise ShapeError(f"a cache {tuple(cache.shape)}; valid: [blocks, heads, {layout.record_bytes}]")
    if cache.stride(2) != 1 or cache.stride(0) % ALIGN or cache.stride(1) % ALIGN or cache.data_ptr() % ALIGN:
        raise ShapeError(f"a cache with strides {cache.stride()} at {cache.data_ptr():#x}; valid on a GPU: contiguous "
                         f"records at multiples of {ALIGN} bytes")


def channels_last(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def assembly(device: torch.device) -> int:
    """Which PTX kernels may use: none (0), what every GPU has (1), sm_89's conversions of e4m3 too (2)."""
    return (capability(device) > 0) + (capability(device) >= 89)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def capability(device: torch.device) -> int:
    """90 for sm_90; 0 for what is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
