"""Balanced keys: one positive scale per RoPE pair, K' = K s and q' = q / s, so that scores stay and rounding gets fair.

A key projection with a bias becomes, after RoPE, a large offset that turns with the position; the Hadamard rotation
would spread it over all channels. The scale is the same for both channels of a pair, so it commutes with RoPE, and its
geometric mean is 1. Two sources, neither needs a data set (docs/accuracy.md, "Balanced keys"):

    from samples   s_j = (rms of q_j / rms of K_j without its tile's mean)^(1/2)
    from weights   s_j = (u_j / (v_j + f_j b_j^2 / 2))^(1/4),  f_j = 1 - (sin(G/2 w_j) / (G/2 w_j))^2,
                   v_j = mean over the pair of |W_k row * norm weight|^2,  b_j^2 = the pair's squared bias amplitude,
                   u_j = the same of the queries, their bias whole; v_j if the query projection is not known

Weights are for projections with a bias only: without one they know less than s = 1 does.
"""

import torch
from torch import Tensor

from kvarn.errors import ShapeError

FLOOR = 1e-3
"""Mean squares are floored at this part of their head's mean: a dead channel must not get an infinite scale."""


def from_samples(q: Tensor, k: Tensor, group: int = 128) -> Tensor:
    """The scale [D] of one KV head, from queries of its GQA group q [n, D] and keys k [t, D], both after RoPE.

    Pairs are (j, j + D/2). Keys beyond the last whole tile of `group` tokens are left out, as their tile's mean, which
    the zero point absorbs, is unknown.

    Raises:
        ShapeError: if k holds less than one tile.
    """
    if k.shape[0] < group:
        raise ShapeError(f"{k.shape[0]} keys: balance needs at least one whole tile of {group} tokens")
    tiles = k[: k.shape[0] // group * group].float().unflatten(0, (-1, group))
    keys = (tiles - tiles.mean(1, keepdim=True)).square().mean((0, 1))
    queries = q.float().square().mean(0)
    return _unit_mean((_floored(_pair_mean(queries), queries) / _floored(_pair_mean(keys), keys)).pow(0.25))


def from_weights(weight: Tensor, bias: Tensor, norm_weight: Tensor | None, inv_freq: Tensor, group: int = 128,
                 query_weight: Tensor | None = None, query_bias: Tensor | None = None) -> Tensor:
    """The scales [H, D] of all KV heads from the projections' constants; pairs are (j, j + D/2).

    Args:
        weight: [H * D, C] of the key projection.
        bias: [H * D].
        norm_weight: [C] of the norm before the projection, or None.
        inv_freq: [D / 2] RoPE angle per position of each pair.
        group: tokens per tile.
        query_weight, query_bias: [Hq * D, C] and [Hq * D] of the query projection; its heads share KV heads in order.
    """
    dim = 2 * inv_freq.shape[0]
    signal = _pair_mean(_row_power(weight, norm_weight).unflatten(0, (-1, dim)))
    offset = 2 * _pair_mean(bias.float().unflatten(0, (-1, dim)).square())
    angle = inv_freq.float() * (group / 2)
    turning = 1 - torch.sinc(angle / torch.pi).square()
    signal = _floored(signal, signal)
    query = signal
    if query_weight is not None:
        power = _row_power(query_weight, norm_weight)
        power = power if query_bias is None else power + query_bias.float().square()
        query = _pair_mean(power.unflatten(0, (signal.shape[0], -1, dim)).mean(1))
        query = _floored(query, query)
    return _unit_mean((query / (signal + torch.cat([turning, turning]) * offset / 2)).pow(0.25))


def _row_power(weight: Tensor, norm_weight: Tensor | None) -> Tensor:
    """Squared length of each row of a projection [n, C] behind a norm: its output's mean square for white inputs."""
    rows = weight.float() if norm_weight is None else weight.float() * norm_weight.float()
    return rows.square().sum(-1)


def _pair_mean(x: Tensor) -> Tensor:
    """Mean over each RoPE pair, repeated for both of its channels; x [..., D]."""
    low, high = x.chunk(2, -1)
    mean = (low + high) / 2
    return torch.cat([mean, mean], -1)


def _floored(x: Tensor, reference: Tensor) -> Tensor:
    return x + FLOOR * reference.mean(-1, keepdim=True)


def _unit_mean(s: Tensor) -> Tensor:
    """s with geometric mean 1 over the last dimension."""
    return s / s.log().mean(-1, keepdim=True).exp()
