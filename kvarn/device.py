"""What every launcher asks of a device or brings its tensors to."""

import torch
from torch import Tensor

from kvarn.errors import ShapeError, SpecError
from kvarn.kernels import configs
from kvarn.layout import StoreLayout


def kernel_offsets(layout: StoreLayout) -> dict[str, int]:
    """configs.offsets of a layout.

    Raises:
        SpecError, ShapeError: if no kernels exist for it.
    """
    spec = layout.spec
    if spec.method != "kvarn" or spec.tail_bits != 8 or spec.sink:
        raise SpecError(f"{spec.key} has no GPU kernels; valid there: method 'kvarn' with an 8-bit tail and no sink, "
                        "or 'k16v16'")
    if spec.k_bits not in configs.BITS or spec.v_bits not in configs.BITS:
        raise SpecError(f"{spec.key} has no GPU kernels; valid there: bits of {configs.BITS}")
    if layout.head_dim not in configs.HEAD_DIMS:
        raise ShapeError(f"head_dim={layout.head_dim} has no GPU kernels; valid there: {configs.HEAD_DIMS}")
    return configs.offsets(layout)


def channels_last(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def has_inline_assembly(device: torch.device) -> bool:
    """Whether kernels may use PTX."""
    return device.type == "cuda" and torch.version.hip is None


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def capability(device: torch.device) -> int:
    """90 for sm_90; 0 for what is no NVIDIA GPU."""
    if not has_inline_assembly(device):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
