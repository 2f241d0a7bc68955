"""A tile's sums and extremes over tokens and channels, and the orders in which they come."""

import pytest
import torch
import triton
import triton.language as tl
from stores import DEVICE

from kvarn.kernels.sums import (
    by_column,
    by_warp,
    channel_sum,
    extremes,
    finite_tile,
    flat_channels,
    folded4,
    token_sum,
    tokens,
    warps,
)


@triton.jit
def reduce_tile(x, of_tokens, names, of_channels, low, high, lengths, clean, Q: tl.constexpr, G: tl.constexpr):
    at = tl.arange(0, Q)[:, None] * G + tl.arange(0, G)[None, :]
    tile = tl.load(x + at), tl.load(x + Q * G + at), tl.load(x + 2 * Q * G + at), tl.load(x + 3 * Q * G + at)
    flat, channels = tl.arange(0, G), flat_channels(Q)
    total = token_sum(folded4(tile), x, Q)
    tl.store(of_tokens + flat, total)
    tl.store(of_tokens + G + flat, by_column(total, Q))
    tl.store(names + flat, tokens(G, Q))
    tl.store(names + G + flat, by_column(by_warp(tl.arange(0, G), Q), Q))
    tl.store(of_channels + channels, channel_sum(tile, x))
    least, greatest = extremes(tile, x)
    tl.store(low + channels, least)
    tl.store(high + channels, greatest)
    tile, length = finite_tile(tile, x)
    tl.store(lengths + flat, by_column(length, Q))
    for i in tl.static_range(4):
        tl.store(clean + i * Q * G + at, tile[i])


def exchanged(index):
    return (index & ~3) | ((index & 1) << 1) | ((index >> 1) & 1)


@pytest.mark.parametrize("dim,group", [(64, 128), (128, 128), (256, 128), (64, 64), (256, 64)])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_a_tile_reduced(dim, group, bad):
    q = dim // 4
    x = torch.randn(4, q, group, device=DEVICE)
    if bad is not None:
        x[1, 3, 5] = bad
    out = [torch.full((n,), -1.0, device=DEVICE) for n in (2 * group, dim, dim, dim, group)]
    names, clean = torch.full((2, group), -1, dtype=torch.int32, device=DEVICE), torch.empty_like(x)
    reduce_tile[(1,)](x, out[0], names, *out[1:], clean, q, group, num_warps=min(warps(q), group // 16))
    column = torch.arange(group, device=DEVICE)
    warp = (column // 8) % warps(q)
    own = torch.cat([column[warp == w] for w in range(warps(q))])  # each warp's columns together
    assert names[0].tolist() == exchanged(own).tolist() and names[1].tolist() == column.tolist()
    # Rows of each quarter are channels in `exchanged` order.
    rows = exchanged(torch.arange(q, device=DEVICE))
    by_channel = x[:, rows].flatten(0, 1)
    finite = x.nan_to_num(0.0).clamp(-65504, 65504) if bad is not None else x
    assert clean.equal(finite)
    torch.testing.assert_close(out[4], finite.square().sum((0, 1)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[0][group:], x.sum((0, 1)), rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(out[0][:group], x.sum((0, 1))[own], rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(out[1], by_channel.sum(1), rtol=1e-4, atol=1e-4, equal_nan=True)
    if bad is None:
        assert out[2].equal(by_channel.amin(1)) and out[3].equal(by_channel.amax(1))
