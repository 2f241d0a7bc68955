"""The paged store: any block table, ragged steps, rollbacks; equal to a plain cache or to the contiguous store."""

import pytest
import torch

import kvarn.paged_ops  # noqa: F401  (defines the ops)
from kvarn import PackedCache, ShapeError, SpecError
from kvarn.frame import unit_balance
from kvarn.layout import StoreLayout
from kvarn.paged_layout import PagedLayout, paged_layout
from kvarn.spec import PRESETS

HEADS, QUERIES, DIM = 2, 6, 64
PAGED = [name for name, spec in PRESETS.items() if not spec.sink]
STEPS = [
    [127, 1, 300, 0], [1, 126, 84, 5], [1, 1, 1, 1], [1, 3, 1, 128], [256, 1, 1, 1], [1, 1, 200, 1], [1, 2, 1, 1],
    [3, 3, 3, 3], [5, 5, 5, 5],
]


class Rows:
    """Sequences in a paged cache, whose blocks lie anywhere in a pool full of old bytes, beside their plain tokens."""

    def __init__(self, preset, rows=4, dtype=torch.float32, blocks=16):
        self.generator = torch.Generator().manual_seed(0)
        self.spec, self.layout = PRESETS[preset], paged_layout(PRESETS[preset].key, DIM, dtype)
        size = (rows * blocks + 1, HEADS, self.layout.record_bytes)
        self.cache = torch.randint(0, 256, size, dtype=torch.uint8, generator=self.generator)
        self.table = (torch.randperm(rows * blocks, generator=self.generator) + 1).view(rows, blocks).int()
        self.balance = torch.rand(HEADS, DIM, generator=self.generator) + 0.5
        self.k = [torch.zeros(HEADS, 0, DIM, dtype=dtype) for _ in range(rows)]
        self.v = [x.clone() for x in self.k]
        self.dtype = dtype

    def new(self, tokens, heads):
        return torch.randn(tokens, heads, DIM, generator=self.generator).to(self.dtype)

    def step(self, counts):
        """Append and attend counts[b] tokens of each row b; returns (q, out) per row."""
        total = sum(counts)
        q, k, v = self.new(total, QUERIES), self.new(total, HEADS), self.new(total, HEADS)
        for b, (x, y) in enumerate(zip(k.split(counts), v.split(counts), strict=True)):
            self.k[b] = torch.cat([self.k[b], x.transpose(0, 1)], 1)
            self.v[b] = torch.cat([self.v[b], y.transpose(0, 1)], 1)
        ends = torch.tensor([x.shape[1] for x in self.k], dtype=torch.int32)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        where = (self.cache, self.table, starts, ends, self.balance)
        torch.ops.kvarn.append_paged(k, v, *where, self.spec.key)
        out = torch.ops.kvarn.attend_paged(q, k, v, *where, max(counts), int(ends.max()), DIM**-0.5, self.spec.key)
        return list(zip(q.split(counts), out.split(counts), strict=True))

    def take_back(self, counts):
        """Forget the last tokens of each row."""
        for side in (self.k, self.v):
            side[:] = [x[:, : x.shape[1] - count] for x, count in zip(side, counts, strict=True)]

    def plain(self, row, q):
        """Attention of the last tokens of a row over its plain keys and values."""
        length = self.k[row].shape[1]
        mask = torch.arange(length) <= torch.arange(length - q.shape[0], length)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], self.k[row][None], self.v[row][None], mask, enable_gqa=True)[0].transpose(0, 1)


def error(out, expected):
    return float((out - expected).norm() / expected.norm()) if len(out) else 0.0


@pytest.mark.parametrize("name, bound", [("k16v16", 1e-5), ("k8v8_g128", 0.03), ("k4v4_g64", 0.3), ("k4v2_g128", 0.6)])
def test_ragged_steps_and_rollbacks_are_near_the_plain_cache(name, bound):
    rows = Rows(name)
    for number, counts in enumerate(STEPS):
        for b, (q, out) in enumerate(rows.step(counts)):
            assert error(out, rows.plain(b, q)) < bound
        if number > 6:
            rows.take_back([2, 1, 0, 3])


@pytest.mark.parametrize("name, open_bound, bound", [("k16v16", 1e-5, 1e-5), ("k8v8_g128", 0.04, 0.04),
                                                     ("k4v4_g128", 0.04, 0.3), ("k4v2_g128", 0.04, 0.6)])
@pytest.mark.parametrize("start, taken", [(121, 4), (121, 9), (118, 1), (127, 10), (124, 7)])
def test_taking_back_tokens_of_a_closed_tile(name, open_bound, bound, start, taken):
    """Speculation over a tile edge: what was accepted is found unrounded, what follows closes the tile anew."""
    rows = Rows(name, rows=1)
    rows.step([start])
    rows.step([10])
    rows.take_back([taken])
    for count in (1, 1, 12, 1):
        [(q, out)] = rows.step([count])
        assert error(out, rows.plain(0, q)) < (open_bound if rows.k[0].shape[1] <= 128 else bound)


@pytest.mark.parametrize("name", [name for name in PAGED if name != "k16v16"])
@pytest.mark.parametrize("length", [1, 127, 129, 300])
def test_records_are_those_of_the_contiguous_store(name, length):
    """The same bytes per closed tile, the same attention of the next token. (Not at 128: a contiguous store that ends
    with a full tile closes it later, from the 8-bit tail.)"""
    rows = Rows(name, rows=1)
    store = PackedCache.empty(name, 1, HEADS, 512, DIM, torch.float32, balance=rows.balance)
    rows.step([length])
    store.append(rows.k[0][None], rows.v[0][None], torch.arange(length))
    [(q, out)] = rows.step([1])
    position = torch.tensor([length])
    k, v = rows.k[0][None, :, -1:], rows.v[0][None, :, -1:]
    store.append(k, v, position)
    expected = store.attend(q.transpose(0, 1)[None], k, v, position, kv_len=length + 1)[0].transpose(0, 1)
    assert torch.allclose(out, expected, atol=1e-5)
    closed = length // rows.spec.group
    assert torch.equal(rows.cache[rows.table[0, :closed].long()].transpose(0, 1), store.records[0, :, :closed])


def test_a_tile_is_readable_by_another_row_in_the_step_that_fills_it():
    rows = Rows("k16v16", rows=2)
    rows.step([127, 0])
    rows.table[1, 0] = rows.table[0, 0]
    rows.k[1], rows.v[1] = rows.k[0], rows.v[0]
    total = rows.new(2, HEADS)
    for side in (rows.k, rows.v):
        side[0] = torch.cat([side[0], total[:1].transpose(0, 1)], 1)
        side[1] = torch.cat([side[0], total[1:].transpose(0, 1)], 1)
    q, where = rows.new(2, QUERIES), (rows.cache, rows.table, torch.tensor([0, 1, 2]), torch.tensor([128, 129]),
                                      rows.balance)
    torch.ops.kvarn.append_paged(total, total, *where, rows.spec.key)
    out = torch.ops.kvarn.attend_paged(q, total, total, *where, 1, 129, DIM**-0.5, rows.spec.key)
    for b in range(2):
        assert error(out[b : b + 1], rows.plain(b, q[b : b + 1])) < 1e-5


def test_padding_tokens_and_rows_write_nothing():
    rows = Rows("k4v2_g128", rows=2)
    before = rows.cache.clone()
    where = (rows.cache, rows.table, torch.tensor([0, 0, 0]), torch.tensor([0, 0]), rows.balance)
    k, q = rows.new(3, HEADS), rows.new(3, QUERIES)
    torch.ops.kvarn.append_paged(k, k, *where, rows.spec.key)
    assert torch.equal(rows.cache, before)
    assert not torch.ops.kvarn.attend_paged(q, k, k, *where, 1, 1, DIM**-0.5, rows.spec.key).any()


def test_the_wrong_block_is_seen():
    """The negative control: two rows' tables exchanged after the tokens are in."""
    rows = Rows("k16v16", rows=2)
    rows.step([200, 200])
    rows.table = rows.table.flip(0)
    for b, (q, out) in enumerate(rows.step([1, 1])):
        assert error(out, rows.plain(b, q)) > 0.1


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_page_fits_a_block_and_spare_blocks_hold_a_tile(name, dim, dtype):
    layout = PagedLayout(PRESETS[name], dim, dtype)
    assert max(field.offset + field.nbytes for field in layout.tail.values()) <= layout.record_bytes
    assert layout.spare * layout.page >= layout.spec.group > (layout.spare - 1) * layout.page
    assert layout.record == StoreLayout(PRESETS[name], dim, dtype).record
    assert layout.blocks(1) == 1 + layout.spare
    assert layout.blocks(layout.spec.group + 1) == 2 + layout.spare


def test_a_sink_has_no_paged_form():
    with pytest.raises(SpecError, match="k4v2_g128"):
        PagedLayout(PRESETS["upstream_k4v2_g128"], 64, torch.float32)


def test_a_cache_of_another_shape_is_refused():
    rows = Rows("k4v2_g128", rows=1)
    k, starts, ends = rows.new(1, HEADS + 1), torch.tensor([0, 1]), torch.tensor([1])
    with pytest.raises(ShapeError, match="valid"):
        torch.ops.kvarn.append_paged(k, k, rows.cache, rows.table, starts, ends, unit_balance(HEADS + 1, DIM, "cpu"),
                                     rows.spec.key)


def test_the_ops_are_well_formed():
    rows = Rows("k4v2_g128", rows=1)
    k, q = rows.new(2, HEADS), rows.new(2, QUERIES)
    where = (rows.cache, rows.table, torch.tensor([0, 2]), torch.tensor([2]), rows.balance)
    torch.library.opcheck(torch.ops.kvarn.append_paged.default, (k, k, *where, rows.spec.key))
    torch.library.opcheck(torch.ops.kvarn.attend_paged.default, (q, k, k, *where, 2, 2, 0.125, rows.spec.key))
