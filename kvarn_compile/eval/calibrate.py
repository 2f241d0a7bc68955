"""Key scales for balanced keys (kvarn/balance.py) of a whole model: from random tokens, text, or the weights."""

from typing import Any

import torch
from torch import Tensor

from kvarn import balance
from kvarn_compile.eval.hf import model_shape, projections, rope_frequencies, run_chunk
from kvarn_compile.eval.session import Recorder

RANDOM_TOKENS = 1024


@torch.no_grad()
def from_tokens(model: Any, ids: Tensor) -> dict[int, Tensor]:
    """Scales [H, D] per layer from one plain forward pass over ids [B, n]."""
    recorder = Recorder()
    run_chunk(model, ids, 0, recorder)
    scales = {}
    for layer, keys in recorder.keys.items():
        queries = recorder.queries[layer].unflatten(1, (keys.shape[1], -1))
        scales[layer] = torch.stack([balance.from_samples(queries[:, h].flatten(0, 2), keys[0, h])
                                     for h in range(keys.shape[1])])
    return scales


def random_ids(vocabulary: int, tokens: int = RANDOM_TOKENS, seed: int = 0, device: str = "cpu") -> Tensor:
    """Seeded random token ids [1, tokens]: the calibration that needs no data."""
    return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed)).to(device)


def from_random(model: Any, device: str, seed: int = 0) -> dict[int, Tensor]:
    """Scales per layer from a seeded pass over random tokens: every process gets the same."""
    return from_tokens(model, random_ids(model_shape(model).vocabulary, seed=seed, device=device))


@torch.no_grad()
def from_weights(model: Any) -> dict[int, Tensor]:
    """Scales per layer from the key projections' constants; empty for layers without a bias."""
    scales = {}
    for layer, (key, query, norm) in enumerate(projections(model)):
        if key.bias is not None:
            scales[layer] = balance.from_weights(key.weight, key.bias, norm, rope_frequencies(model),
                                                 query_weight=query.weight, query_bias=query.bias)
    return scales
