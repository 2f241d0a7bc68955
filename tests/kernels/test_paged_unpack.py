"""Unpacking rows of a paged store into too small a buffer writes no further than its end."""

import pytest
import torch
from pages import Pages
from stores import DEVICE

from kvarn.device import kernel_offsets
from kvarn.kernels import configs, paged_unpack
from kvarn.paged import unpacked_starts


@pytest.mark.parametrize("size", [147, 100])
def test_nothing_is_written_behind_the_end(size):
    pages = Pages("k4v2_g128", 64, torch.float16, rows=2)
    pages.write((140, 3))
    k, v = (x.to(DEVICE) for x in pages.new((2, 2)))
    table, starts, ends = (x.to(DEVICE) for x in pages.where((2, 2)))
    out = torch.full((2, 160, *k.shape[1:]), 7.0, dtype=k.dtype, device=DEVICE)
    (k_out, v_out), (block, warps) = out[:, :size].unbind(), configs.unpack_paged(64)
    paged_unpack.unpack(k, v, pages.gpu, table, starts, ends, unpacked_starts(starts, ends), pages.balance.to(DEVICE),
                        k_out, v_out, 142, block, warps, pages.layout.page, pages.layout.spare,
                        **kernel_offsets(pages.layout))
    assert (out[:, size:] == 7).all()
    assert (out[:, :size] != 7).flatten(2).any(2).all()
