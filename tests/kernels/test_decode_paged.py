"""A step's few tokens per row over paged tiles: ragged rows, the staircase between tokens, window, soft cap, sinks.

The store is written by the CPU implementation; the float64 reference reads the same bytes.
"""

import pytest
import torch
from stores import DEVICE, balance, error, tokens

from kvarn.decode_cuda import decode_limit, decode_paged, decode_store
from kvarn.errors import ShapeError
from kvarn.hadamard import hadamard
from kvarn.paged import append_paged_cpu, attend_paged_cpu
from kvarn.paged_layout import PagedLayout
from kvarn.quantize import decode, read_tail
from kvarn.spec import PRESETS

HEADS = 2


class Step:
    """A paged store whose rows hold ends[b] tokens, the last counts[b] of which came with this step."""

    def __init__(self, ends, counts, preset="k4v2_g64", dim=64, dtype=torch.float16, ratio=2, padding=0):
        self.ends, self.counts, self.dim = ends, counts, dim
        self.layout, self.balance = PagedLayout(PRESETS[preset], dim, dtype), balance(HEADS, dim)
        width = self.layout.blocks(max(ends)) + 1
        blocks = torch.randperm(len(ends) * width + 3, generator=torch.Generator().manual_seed(0))
        self.table = blocks[: len(ends) * width].view(len(ends), width).int()
        self.cache = torch.randint(0, 256, (len(blocks), HEADS, self.layout.record_bytes), dtype=torch.uint8)
        self._append([end - count for end, count in zip(ends, counts, strict=True)], ends, 1)
        self.k, self.v, self.starts = self._append(counts, ends, 2)
        n = sum(counts) + padding
        self.q = torch.randn(n, HEADS * ratio, dim, generator=torch.Generator().manual_seed(3)).to(dtype)

    def _append(self, counts, ends, seed):
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        k, v = (x[0].transpose(0, 1) for x in tokens(1, HEADS, sum(counts), self.dim, self.layout.dtype, seed))
        ends = torch.tensor(ends if seed == 2 else counts).int()
        append_paged_cpu(k, v, self.cache, self.table, starts, ends, self.balance, self.layout.spec.key)
        return k, v, starts

    def run(self, cache=None, more=100, **how):
        """decode_paged on DEVICE into poisoned memory, back on the CPU; it is told of `more` tokens than there are."""
        out = torch.full(self.q.shape, torch.nan, dtype=self.q.dtype, device=DEVICE)
        cache = self.cache.to(DEVICE) if cache is None else cache
        args = (x.to(DEVICE) for x in (self.table, self.starts, torch.tensor(self.ends).int(), self.balance))
        decode_paged(self.q.to(DEVICE), cache, *args, max(self.counts), max(self.ends) + more, self.dim**-0.5,
                     self.layout, out, **how)
        assert out[sum(self.counts):].isnan().all()
        return out[: sum(self.counts)].cpu()

    def stored(self, row):
        """What row holds, plain frame: k, v [H, end, D] float64."""
        opened, group = (self.ends[row] - 1) // self.layout.spec.group, self.layout.spec.group
        pages = self.table[row, opened + self.layout.spare - torch.arange(self.layout.spare)].long()
        closed = decode(self.cache[self.table[row, :opened].long()].transpose(0, 1), self.layout)
        sides = []
        for tiles, page in zip(closed, read_tail(self.cache[pages].transpose(0, 1), self.layout), strict=True):
            sides.append(torch.cat([tiles.flatten(1, 2), page.flatten(1, 2)[:, :group]], 1)[:, : self.ends[row]])
        h = hadamard(self.dim, sides[0].device, torch.float64)
        return sides[0].double() @ h / self.balance.double()[:, None], sides[1].double() @ h

    def expected(self, window=0, softcap=0.0, sinks=None):
        """softmax(cap tanh(q k / cap)) v in float64, over the window and beside the sinks."""
        outs, ratio = [], self.q.shape[1] // HEADS
        for row, (end, count) in enumerate(zip(self.ends, self.counts, strict=True)):
            if count == 0:
                continue
            k, v = (x.repeat_interleave(ratio, 0) for x in self.stored(row))
            q = self.q[self.starts[row] : self.starts[row + 1]].double().transpose(0, 1)
            scores = q @ k.transpose(1, 2) * self.dim**-0.5
            scores = softcap * (scores / softcap).tanh() if softcap else scores
            behind = torch.arange(end - count, end)[:, None] - torch.arange(end)
            scores = scores.masked_fill((behind < 0) | (behind >= (window or end)), -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], -1)
            outs.append((scores.softmax(-1)[..., :end] @ v).transpose(0, 1))
        return torch.cat(outs)


@pytest.mark.parametrize("ends,counts", [
    ((1, 127, 128, 129), (1, 1, 1, 1)), ((64, 65, 63), (1, 1, 1)), ((66, 130, 200), (3, 3, 1)),
    ((90, 3, 70), (0, 3, 1)), ((128, 129, 130), (4, 4, 2)), ((0, 70), (0, 1))])
def test_ragged_rows(ends, counts):
    step = Step(ends, counts, padding=2)
    assert error(step.run(), step.expected()) < 3e-3


def test_equals_the_cpu_implementation():
    """Up to the step's own tokens, which that attends unrounded."""
    step = Step((150, 40, 257), (1, 2, 1))
    starts, ends = step.starts, torch.tensor(step.ends).int()
    reference = attend_paged_cpu(step.q, step.k, step.v, step.cache, step.table, starts, ends, step.balance, 2, 257,
                                 step.dim**-0.5, step.layout.spec.key)
    assert error(step.run(), reference.double()) < 1e-2


@pytest.mark.parametrize("end", [128, 150])
def test_equals_a_contiguous_store_to_the_bit(end):
    """The same bytes at other addresses: full open tile or not."""
    step = Step((end,), (1,))
    layout, opened = step.layout, (end - 1) // step.layout.spec.group
    pages = step.cache[step.table[0, opened + layout.spare - torch.arange(layout.spare)].long()]
    tail = torch.zeros(1, HEADS, layout.whole.tail_bytes, dtype=torch.uint8)
    for name, field in layout.whole.tail.items():
        field.of(tail)[0] = layout.tail[name].of(pages).transpose(0, 1).flatten(1, 2)[:, : layout.spec.group]
    records = step.cache[step.table[0, : opened + 1].long()].transpose(0, 1)[None].contiguous()
    q, out = step.q[:, :, None].to(DEVICE), torch.empty_like(step.q[:, :, None], device=DEVICE)
    decode_store(q, records.to(DEVICE), tail.to(DEVICE), torch.tensor([end], device=DEVICE), step.balance.to(DEVICE),
                 None, end, step.dim**-0.5, layout.whole, out)
    assert torch.equal(step.run(more=0), out[:, :, 0].cpu())


@pytest.mark.parametrize("ratio,counts", [(1, (1, 1)), (5, (1, 3)), (8, (2, 1)), (16, (4, 1))])
def test_query_heads_per_kv_head(ratio, counts):
    step = Step((100, 75), counts, ratio=ratio)
    assert error(step.run(), step.expected()) < 3e-3


@pytest.mark.parametrize("preset,dim,dtype", [("k4v2_g128", 128, torch.bfloat16), ("k8v8_g128", 64, torch.float16),
                                              ("k4v4_g64", 64, torch.float32)])
def test_formats(preset, dim, dtype):
    step = Step((140, 129), (1, 2), preset, dim, dtype)
    assert error(step.run(), step.expected()) < (6e-3 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("window", [1, 40, 64, 1000])
def test_window(window):
    step = Step((300, 66, 20), (1, 3, 2))
    out = step.run(window=window)
    assert error(out, step.expected(window)) < 3e-3
    assert (error(out, step.expected()) > 0.05) == (window < 300)


def test_tiles_before_the_window_are_not_read():
    step = Step((300,), (2,))
    expected = step.run(window=60)
    step.cache[step.table[0, :3].long()] = 255  # every scale a NaN; the window starts in the tile after
    assert torch.equal(step.run(window=60), expected)
    assert not step.run().isfinite().all()


def test_softcap():
    step = Step((150, 70), (1, 3))
    step.q *= 8
    assert error(step.run(softcap=5.0), step.expected(softcap=5.0)) < 3e-3
    assert error(step.run(softcap=5.0), step.expected()) > 0.05


def test_sinks():
    step = Step((150, 3), (1, 3))
    sinks = torch.tensor([3.0, -torch.inf, 0.5, 40.0])
    out = step.run(sinks=sinks.to(DEVICE))
    assert error(out, step.expected(sinks=sinks)) < 3e-3
    assert out[:, 3].abs().max() < 1e-3 and error(out, step.expected()) > 0.05


def test_the_cache_may_be_a_view():
    """Strides over blocks and heads are the cache's own: every other block and head of a larger one."""
    step = Step((150, 70), (1, 2))
    blocks, heads, size = step.cache.shape
    wide = torch.full((2 * blocks, 2 * heads, size), 255, dtype=torch.uint8, device=DEVICE)
    wide[::2, ::2] = step.cache.to(DEVICE)
    assert torch.equal(step.run(wide[::2, ::2]), step.run())


def test_more_tokens_than_decode_takes_are_refused():
    assert decode_limit(1) == 64 and decode_limit(5) == 12 and decode_limit(100) == 1
    with pytest.raises(ShapeError, match="at most 32 tokens"):
        Step((40,), (33,)).run()


@pytest.mark.parametrize("records, words", [(lambda cache: torch.cat([cache, cache[..., :16]], 2), "valid: .blocks"),
                                            (lambda cache: cache.new_zeros(*cache.shape[:2], 9 + cache.shape[2])
                                             [..., 9:].copy_(cache), "strides")])
def test_a_cache_that_would_be_misread_is_refused(records, words):
    """Records of another size; records at odd addresses."""
    step = Step((40,), (1,))
    with pytest.raises(ShapeError, match=words):
        step.run(records(step.cache.to(DEVICE)))
