"""The orthonormal Sylvester-Hadamard rotation: H = H^T = H^-1, so rotating twice is the identity."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def hadamard(dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix H [dim, dim] with entries +-dim^-1/2.

    Raises:
        ValueError: if `dim` is not a power of two.
    """
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"dim={dim}: a Sylvester-Hadamard matrix exists for powers of two only")
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h * dim**-0.5).to(device, dtype)


def rotate(x: Tensor) -> Tensor:
    """x H over the last dimension, in x's dtype."""
    return x @ hadamard(x.shape[-1], x.device, x.dtype)
