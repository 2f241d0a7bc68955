"""The op boundary (schema, fake, mutation) and the balance math."""

import pytest
import torch

from kvarn import PackedCache, ShapeError, balance
from kvarn.frame import keys_in, queries_in
from kvarn.layout import StoreLayout
from kvarn.spec import PRESETS, resolve


def arguments(name="k4v2_g64", count=3):
    store = PackedCache.empty(name, 2, 2, 128, 32, torch.float32)
    k, v = torch.randn(2, 2, 2, count, 32)
    return store, k, v, torch.arange(count)


@pytest.mark.parametrize("name", ["k4v2_g64", "k16v16"])
def test_ops_satisfy_their_schema_and_fake(name):
    store, k, v, positions = arguments(name)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.kvarn.append.default,
                          (k, v, positions, *store.tensors(), store.capacity, store.spec.key),
                          test_utils=checks)
    q = torch.randn(2, 4, 3, 32)
    mask = torch.ones(1, 1, 3, 128, dtype=torch.bool)
    torch.library.opcheck(torch.ops.kvarn.attend.default,
                          (q, k, v, positions, *store.tensors(), mask, 128, False, 0.2, store.spec.key),
                          test_utils=checks)
    torch.library.opcheck(torch.ops.kvarn.sdpa.default, (q, k, v, None, 0.0, False, None, True), test_utils=checks)


def test_the_spec_key_reaches_the_op():
    store, k, v, positions = arguments()
    with pytest.raises(ValueError, match="not a spec key"):
        torch.ops.kvarn.append(k, v, positions, *store.tensors(), 128, "k4v2")


@pytest.mark.parametrize("name", PRESETS)
def test_the_frame_keeps_scores(name):
    layout = StoreLayout(resolve(name), 32, torch.float32)
    scale = torch.rand(2, 32) + 0.5
    k, q = torch.randn(1, 2, 5, 32), torch.randn(1, 6, 4, 32)
    plain = q.unflatten(1, (2, 3)) @ k[:, :, None].transpose(-1, -2)
    stored = (queries_in(q, scale, layout).unflatten(1, (2, 3)) @
              keys_in(k, scale, layout)[:, :, None].transpose(-1, -2))
    torch.testing.assert_close(stored, plain, rtol=1e-4, atol=1e-5)


def rope(x, inv_freq):
    angle = torch.arange(x.shape[-2])[:, None] * inv_freq
    cos, sin = (torch.cat([f, f], -1) for f in (angle.cos(), angle.sin()))
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def test_balance_commutes_with_rope_and_has_unit_mean():
    inv_freq = 10000 ** (-torch.arange(16) / 16)
    q, k = torch.randn(200, 32), torch.randn(256, 32) * torch.linspace(0.1, 4, 32)
    s = balance.from_samples(q, k)
    assert torch.equal(s[:16], s[16:])
    assert abs(float(s.log().mean())) < 1e-5
    torch.testing.assert_close(rope(k * s, inv_freq), rope(k, inv_freq) * s, rtol=1e-4, atol=1e-4)
    with pytest.raises(ShapeError, match="at least one whole tile"):
        balance.from_samples(q, k[:100])


def test_balance_shrinks_channels_with_a_turning_bias_only():
    inv_freq = 10000 ** (-torch.arange(16) / 16)
    weight, bias = torch.randn(64, 48), torch.zeros(64)
    torch.testing.assert_close(balance.from_weights(weight, bias, None, inv_freq), torch.ones(2, 32))
    bias[0] = 100.0   # fast pair of head 0: turns within a tile
    bias[47] = 100.0  # slowest pair of head 1: the zero point absorbs it
    s = balance.from_weights(weight, bias, torch.ones(48), inv_freq)
    assert float(s[0, 0]) < 0.5 and float(s[0, 16]) == float(s[0, 0])
    assert 0.8 < float(s[1, 15]) < 1.2


def test_balance_from_weights_gives_strong_queries_finer_keys():
    inv_freq = 10000 ** (-torch.arange(16) / 16)
    weight, queries = torch.randn(64, 48), torch.randn(128, 48)
    queries[[3, 19, 35, 51]] *= 8  # the fourth pair of both query heads of KV head 0
    s = balance.from_weights(weight, torch.zeros(64), None, inv_freq, query_weight=queries, query_bias=torch.zeros(128))
    assert s.shape == (2, 32) and torch.equal(s[:, :16], s[:, 16:])
    assert int(s[0].argmax()) % 16 == 3 and float(s[0, 3]) > 2 > float(s[1].max())
