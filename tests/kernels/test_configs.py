"""Launch configurations are functions of shapes: what the measured shapes get, and that nothing gets too little."""

import pytest
import torch

from kvarn.kernels import configs, sums
from kvarn.layout import StoreLayout
from kvarn.spec import PRESETS

RESIDENT = 528
"""Programs of two warps that an H100 runs at once."""


@pytest.mark.parametrize("groups,tiles,best", [(8, 256, 66), (32, 256, 16), (256, 128, 2), (64, 32, 8)])
def test_best_splits_are_the_fastest_measured(groups, tiles, best):
    """benchmarks/explore_decode.py on an H100: batch 1, 4, 32 and 8 with 8 KV heads."""
    assert configs.best_splits(groups, tiles, RESIDENT) == best


@pytest.mark.parametrize("groups", [1, 7, 300, 529, 5000])
@pytest.mark.parametrize("tiles", [1, 3, 8192])
def test_no_more_splits_than_tiles(groups, tiles):
    assert 1 <= configs.best_splits(groups, tiles, RESIDENT) <= tiles


def test_a_group_just_over_half_a_wave_is_not_left_with_half_the_processor():
    assert configs.best_splits(RESIDENT // 2 + 40, 512, RESIDENT) > 1


@pytest.mark.parametrize("dim,queries,block", [(128, 1, 8), (128, 8, 8), (128, 9, 16), (128, 64, 16), (256, 64, 8)])
def test_blocks_of_query_rows(dim, queries, block):
    layout = StoreLayout(PRESETS["k4v2_g128"], dim, torch.bfloat16)
    config = configs.decode(4, 8, 64, queries, layout, 132)
    assert config.block == block and (config.num_warps < 4 or block == 8)


@pytest.mark.parametrize("dim", configs.HEAD_DIMS)
def test_tiles_are_rounded_by_the_warps_that_sums_are_for(dim):
    assert configs.fill(dim, 128, 90)[0] == sums.warps(dim // 4)
