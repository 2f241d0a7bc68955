"""Twin paged stores for kernel tests: one written by the CPU implementation, one by the kernels."""

import torch
from stores import DEVICE, balance, tokens

from kvarn.paged import append_paged_cpu
from kvarn.paged_cuda import append_paged_cuda
from kvarn.paged_layout import paged_layout
from kvarn.spec import resolve


class Pages:
    """Rows of a paged store in a pool full of old bytes, in both versions, beside their plain tokens [length, H, D]."""

    def __init__(self, spec, dim, dtype, rows=3, heads=2, blocks=14, padded=0):
        g = torch.Generator().manual_seed(0)
        self.spec, self.dim, self.dtype, self.heads = resolve(spec), dim, dtype, heads
        self.layout = paged_layout(self.spec.key, dim, dtype)
        size = (rows * blocks + 1, heads, self.layout.record_bytes)
        self.cpu = torch.randint(0, 256, size, dtype=torch.uint8, generator=g)
        # On the device a block may lie in a wider one, as in a pool that several kinds of layers share.
        self.gpu = torch.empty(size[0], heads * size[2] + padded, dtype=torch.uint8, device=DEVICE)
        self.gpu = self.gpu[:, : heads * size[2]].unflatten(1, (heads, -1))
        self.gpu.copy_(self.cpu)
        self.table = (torch.randperm(rows * blocks, generator=g) + 1).view(rows, blocks).int()
        self.balance = balance(heads, dim)
        self.k = [torch.zeros(0, heads, dim, dtype=dtype) for _ in range(rows)]
        self.v = [x.clone() for x in self.k]
        self.seed = 0

    def new(self, counts):
        """k, v [sum of counts, H, D]: they become the rows' last tokens."""
        self.seed += 1
        k, v = (x[0].transpose(0, 1) for x in tokens(1, self.heads, sum(counts), self.dim, self.dtype, self.seed))
        for side, x in ((self.k, k), (self.v, v)):
            side[:] = [torch.cat(pair) for pair in zip(side, x.split(list(counts)), strict=True)]
        return k, v

    def take_back(self, counts):
        """Forget the last tokens of each row."""
        for side in (self.k, self.v):
            side[:] = [x[: len(x) - count] for x, count in zip(side, counts, strict=True)]

    def where(self, counts):
        """table, starts, ends of a step that brought counts[b] tokens of each row."""
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        return self.table, starts, torch.tensor([len(x) for x in self.k]).int()

    def write(self, counts, padding=0):
        """A step, appended to both; k and v are slices of one matrix with `padding` more rows. Returns k, v."""
        k, v = self.new(counts)
        where = self.where(counts)
        append_paged_cpu(k, v, self.cpu, *where, self.balance, self.spec.key)
        joint = torch.full((len(k) + padding, 2, self.heads, self.dim), torch.nan, dtype=self.dtype)
        joint[: len(k)] = torch.stack([k, v], 1)
        own = joint.to(DEVICE).unbind(1)
        append_paged_cuda(*own, self.gpu, *(x.to(DEVICE) for x in (*where, self.balance)), self.spec.key)
        return k, v
