"""Nearly exact tokens: one 16-bit word per channel holds the key in its upper bits and the value in its lower ones.

    word = round(k / k_scale) * 2^value_bits + (round(v / v_scale) mod 2^value_bits)

both symmetric per token: scale = largest magnitude / (2^(bits - 1) - 1), float16. Keys get the larger part: a key bias,
which the rotation spreads over all channels, makes a token's largest magnitude many times what tells it from others,
while a value's rounding averages out over the tokens an attention sums (docs/accuracy.md, "The unfinished tile").
"""

import torch
from torch import Tensor


def to_words(k: Tensor, v: Tensor, value_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens k, v [..., D] float32, finite, to words int16 [..., D] and the scales of k and v float16 [...]."""
    k_codes, k_scale = _codes(k, 16 - value_bits)
    v_codes, v_scale = _codes(v, value_bits)
    words = (k_codes << value_bits) | (v_codes & (2**value_bits - 1))
    return words.to(torch.int16), k_scale, v_scale


def from_words(words: Tensor, k_scale: Tensor, v_scale: Tensor, value_bits: int) -> tuple[Tensor, Tensor]:
    """Words int16 [..., D] and scales [...] back to k, v [..., D] float32."""
    wide = words.to(torch.int32)
    half = 2 ** (value_bits - 1)
    k, v = wide >> value_bits, ((wide + half) & (2 * half - 1)) - half
    return k.float() * k_scale.float()[..., None], v.float() * v_scale.float()[..., None]


def _codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1) / top).clamp(max=65504.0).half()
    codes = (x / scale.float().clamp_min(1e-8)[..., None]).round().clamp(-top, top)
    return codes.to(torch.int32), scale
