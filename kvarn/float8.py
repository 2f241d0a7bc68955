"""Rounding to the 8-bit float e4m3 (1 sign, 4 exponent, 3 mantissa bits; largest value 448), and up to float16."""

import torch
from torch import Tensor

MAX = 448.0


def nearest(x: Tensor) -> Tensor:
    """x rounded to the nearest e4m3 value, saturating at +-448."""
    return x.clamp(-MAX, MAX).to(torch.float8_e4m3fn)


def upward_half(x: Tensor) -> Tensor:
    """Non-negative x rounded up to a float16 value, saturating at 65504."""
    y = x.clamp(max=65504.0).half()
    bits = y.view(torch.int16)
    short = (y.float() < x) & (bits < 0x7BFF)
    return (bits + short.to(torch.int16)).view(torch.float16)
