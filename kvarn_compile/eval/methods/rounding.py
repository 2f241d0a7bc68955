"""Rounding that several peers share."""

import torch
from torch import Tensor


def asymmetric(x: Tensor, dim: int, bits: int) -> Tensor:
    """x rounded to 2^bits even steps from its minimum to its maximum over `dim`; step and minimum kept in float16."""
    low = x.amin(dim, keepdim=True).half().float()
    step = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float()
    codes = ((x - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, 2**bits - 1)
    return codes * step + low


def symmetric(x: Tensor, dim: int, bits: int) -> Tensor:
    """x rounded to steps of its largest magnitude over `dim` / (2^(bits-1) - 1); step kept in float16."""
    top = 2 ** (bits - 1) - 1
    step = (x.abs().amax(dim, keepdim=True) / top).half().float()
    return (x / torch.where(step > 0, step, 1.0)).round().clamp(-top - 1, top) * step
