"""The packed store as a write-back cache: any order of writes means what it means for a plain tensor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn import PackedCache, PositionError, ShapeError, reference
from kvarn.spec import PRESETS

HEADS, DIM = 2, 32


def tokens(rows, count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, HEADS, count, DIM, generator=generator).to(dtype) for _ in range(2)]


def close(stored, plain, name):
    """Equal for the lossless preset; within the preset's rounding (relative error) for the others."""
    if name == "k16v16":
        return torch.equal(stored, plain)
    bound = 0.02 if "k8" in name else 0.45
    return float((stored - plain).norm() / plain.norm()) < bound


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 255, 300])
def test_one_write_and_single_tokens_agree(name, length):
    k, v = tokens(2, length)
    whole = PackedCache.empty(name, 2, HEADS, 384, DIM, torch.float32)
    whole.append(k, v, torch.arange(length))
    step = PackedCache.empty(name, 2, HEADS, 384, DIM, torch.float32)
    step.append(k[:, :, : length - 1], v[:, :, : length - 1], torch.arange(length - 1))
    step.append(k[:, :, length - 1 :], v[:, :, length - 1 :], torch.arange(length - 1, length))
    assert whole.lengths.tolist() == step.lengths.tolist() == [length, length]
    for store in (whole, step):
        for stored, plain in zip(store.unpack(), (k, v), strict=True):
            assert close(stored[:, :, :length], plain, name)
            assert not stored[:, :, length:].any()


@given(st.lists(st.tuples(st.integers(0, 250), st.integers(1, 140)), min_size=1, max_size=6), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_any_write_order_equals_the_plain_tensor(writes, seed):
    """The lossless store against index_copy_: appends, rewinds into closed tiles, jumps, overlaps."""
    plain = torch.zeros(2, HEADS, 384, DIM)
    store = PackedCache.empty("k16v16", 2, HEADS, 384, DIM, torch.float32)
    for number, (start, count) in enumerate(writes):
        k, v = tokens(2, count, seed * 10 + number)
        count = min(count, 384 - start)
        positions = torch.arange(start, start + count)
        plain.index_copy_(2, positions, k[:, :, :count])
        store.append(k[:, :, :count], v[:, :, :count], positions)
        assert torch.equal(store.unpack()[0], plain)


def test_positions_in_any_order_and_per_row():
    store = PackedCache.empty("k16v16", 2, HEADS, 256, DIM, torch.float32)
    plain = torch.zeros(2, HEADS, 256, DIM)
    positions = torch.tensor([[5, 6, 200, 130, 131], [250, 251, 3, 64, 65]])
    k, v = tokens(2, 5)
    for row in range(2):
        plain[row, :, positions[row]] = k[row]
    store.append(k, v, positions)
    assert torch.equal(store.unpack()[0], plain)
    assert store.lengths.tolist() == [132, 66]


def test_rewind_reopens_the_tile_and_later_closes_it_again():
    k, v = tokens(1, 300)
    store = PackedCache.empty("k8v8_g128", 1, HEADS, 384, DIM, torch.float32)
    store.append(k, v, torch.arange(300))
    new_k, new_v = tokens(1, 60, seed=1)
    store.append(new_k, new_v, torch.arange(100, 160))
    k[:, :, 100:160], v[:, :, 100:160] = new_k, new_v
    assert store.lengths.tolist() == [160]
    for stored, plain in zip(store.unpack(), (k, v), strict=True):
        assert close(stored[:, :, :300], plain, "k8v8_g128")


def test_fewer_rows_than_the_store_leave_the_others_alone():
    store = PackedCache.empty("k16v16", 3, HEADS, 128, DIM, torch.float32)
    k, v = tokens(3, 10)
    store.append(k, v, torch.arange(10))
    store.append(k[:2] * 2, v[:2], torch.arange(10))
    assert torch.equal(store.unpack()[0][:, :, :10], torch.cat([k[:2] * 2, k[2:]]))


@pytest.mark.parametrize("name", ["k16v16", "k4v2_g64", "upstream_k4v2_g128"])
def test_load_truncate_reset_reorder(name):
    k, v = tokens(3, 200)
    k[1, :, 150:], v[1, :, 150:] = 0, 0
    store = PackedCache.empty(name, 3, HEADS, 256, DIM, torch.float32)
    store.load(k, v)
    assert store.lengths.tolist() == [200, 150, 200]
    assert close(store.unpack()[0][:, :, :200], k, name)
    store.reorder(torch.tensor([1, 1, 0]))
    assert store.lengths.tolist() == [150, 150, 200]
    assert close(store.unpack()[1][2:, :, :200], v[:1], name)
    store.truncate(70)
    assert store.lengths.tolist() == [70, 70, 70]
    assert not store.unpack()[0][:, :, 70:].any()
    store.reset()
    assert not store.unpack()[0].any() and store.lengths.tolist() == [0, 0, 0]


def test_errors_name_value_and_bound():
    store = PackedCache.empty("k4v2_g64", 1, HEADS, 100, DIM, torch.float32)
    k, v = tokens(1, 2)
    with pytest.raises(PositionError, match=r"position 100 is outside.*0\.\.99"):
        store.append(k, v, torch.tensor([99, 100]))  # its last tile would have room
    with pytest.raises(PositionError, match="position -1"):
        store.append(k, v, torch.tensor([-1, 0]))
    with pytest.raises(ShapeError, match="do not fit a store of 1 rows"):
        store.append(*tokens(2, 2), torch.arange(2))
    with pytest.raises(ShapeError, match="3 positions for 2 tokens"):
        store.append(k, v, torch.arange(3))
    with pytest.raises(PositionError, match=r"length 101; valid: 0\.\.100"):
        store.truncate(101)


@pytest.mark.parametrize("name", ["k16v16", "k4v2_g128", "k4v4_g64", "k8v8_g128", "upstream_k4v2_g128"])
@pytest.mark.parametrize("group", [1, 4, 5, 7])
@pytest.mark.parametrize("length", [1, 64, 127, 128, 129, 300])
def test_one_token_attention_equals_float64_over_what_is_stored(name, group, length):
    torch.manual_seed(length)
    k, v = tokens(2, length)
    balance = torch.rand(HEADS, DIM) + 0.5
    store = PackedCache.empty(name, 2, HEADS, 384, DIM, torch.float32, balance=balance)
    store.append(k, v, torch.arange(length))
    q = torch.randn(2, HEADS * group, 1, DIM)
    mask = (torch.arange(384) < length)[None, None, None] & (torch.rand(2, 1, 1, 384) < 0.8)
    mask[..., length - 1] = True
    out = store.attend(q, k[:, :, -1:], v[:, :, -1:], torch.tensor([length - 1]), mask)
    read = reference.read_store(*store.tensors(), store.layout)
    expected = reference.attention(q, *(x[:, :, :384] for x in read), mask)
    torch.testing.assert_close(out.double(), expected, rtol=2e-4, atol=2e-5)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    again = store.attend(q, k[:, :, -1:], v[:, :, -1:], torch.tensor([length - 1]), additive)
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["k16v16", "k4v2_g128", "upstream_k4v2_g128"])
@pytest.mark.parametrize("start", [0, 100, 128, 200])
def test_a_chunk_attends_its_own_tokens_unrounded(name, start):
    count = 140
    k, v = tokens(1, start + count)
    store = PackedCache.empty(name, 1, HEADS, 384, DIM, torch.float32)
    store.append(k[:, :, :start], v[:, :, :start], torch.arange(start))
    history = [x[:, :, :start] for x in reference.read_store(*store.tensors(), store.layout)]
    own_k, own_v, positions = k[:, :, start:], v[:, :, start:], torch.arange(start, start + count)
    store.append(own_k, own_v, positions)
    q = torch.randn(1, HEADS * 2, count, DIM)
    mask = torch.arange(384)[None] <= positions[:, None]
    out = store.attend(q, own_k, own_v, positions, mask)
    if (start % 128 == 0 and name != "k4v2_g128") or name == "k16v16":
        # Elsewhere the chunk closes the tile that was open when `history` was read.
        full = [torch.cat([old, new.double()], 2) for old, new in zip(history, (own_k, own_v), strict=True)]
        expected = reference.attention(q, *full, mask[:, : start + count])
        torch.testing.assert_close(out.double(), expected, rtol=2e-4, atol=2e-5)
    exact = reference.attention(q, k, v, mask[:, : start + count])
    error = float((out - exact).norm() / exact.norm())
    assert error < (1e-5 if name == "k16v16" or start == 0 else 0.5)
    if start == 0:
        causal = store.attend(q, own_k, own_v, positions, is_causal=True)
        torch.testing.assert_close(causal, out, rtol=1e-4, atol=1e-5)


def test_no_mask_attends_stale_and_unwritten_positions_as_the_plain_tensor_does():
    store = PackedCache.empty("k4v2_g64", 1, HEADS, 192, DIM, torch.float32)
    k, v = tokens(1, 70)
    store.append(k, v, torch.arange(70))
    q = torch.randn(1, HEADS, 1, DIM)
    out = store.attend(q, k[:, :, -1:], v[:, :, -1:], torch.tensor([69]), kv_len=150)
    read = reference.read_store(*store.tensors(), store.layout)
    expected = reference.attention(q, *(x[:, :, :150] for x in read))
    torch.testing.assert_close(out.double(), expected, rtol=2e-4, atol=2e-5)


def test_a_query_that_sees_nothing_gives_zeros():
    store = PackedCache.empty("k4v2_g64", 2, HEADS, 128, DIM, torch.float32)
    k, v = tokens(2, 70)
    store.append(k, v, torch.arange(70))
    q = torch.randn(2, HEADS, 1, DIM)
    mask = torch.ones(2, 1, 1, 128, dtype=torch.bool)
    mask[0] = False
    out = store.attend(q, k[:, :, -1:], v[:, :, -1:], torch.tensor([69]), mask)
    assert not out[0].any() and out[1].any()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_models(dtype, bound):
    k, v = tokens(1, 200, dtype=dtype)
    store = PackedCache.empty("k4v2_g128", 1, HEADS, 256, DIM, dtype)
    store.append(k, v, torch.arange(200))
    q = torch.randn(1, HEADS * 3, 1, DIM).to(dtype)
    out = store.attend(q, k[:, :, -1:], v[:, :, -1:], torch.tensor([199]), kv_len=200)
    read = reference.read_store(*store.tensors(), store.layout)
    expected = reference.attention(q, *(x[:, :, :200] for x in read))
    assert out.dtype == dtype and out.is_contiguous()
    assert float((out.double() - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("shape", [(2, 8, 5, 256), (8, 5, 256), (5, 256), None])
def test_heads_unpacked_together_do_not_matter(shape, monkeypatch):
    k, v = torch.randn(2, 2, 4, 200, DIM)
    store = PackedCache.empty("k4v2_g64", 2, 4, 256, DIM, torch.float32)
    store.append(k, v, torch.arange(200))
    q, mask = torch.randn(2, 8, 5, DIM), None if shape is None else torch.randn(shape)
    outs = []
    for tiles in (512, 1):
        monkeypatch.setattr("kvarn.attention._TILES_AT_ONCE", tiles)
        outs.append(store.attend(q, k[:, :, 195:], v[:, :, 195:], torch.arange(195, 200), mask))
    torch.testing.assert_close(outs[1], outs[0])


def test_a_query_of_nan_stays_nan():
    """A broken model must not look healthy: only rows that see nothing become zeros."""
    store = PackedCache.empty("k4v2_g64", 1, HEADS, 128, DIM, torch.float32)
    k, v = tokens(1, 70)
    store.append(k, v, torch.arange(70))
    q = torch.full((1, HEADS, 1, DIM), float("nan"))
    out = store.attend(q, k[:, :, -1:], v[:, :, -1:], torch.tensor([69]), torch.ones(1, 1, 1, 128, dtype=torch.bool))
    assert out.isnan().all()
