import torch

from kvarn import PackedCache
from kvarn.hadamard import hadamard
from kvarn_compile import picture


def outlier_tile():
    torch.manual_seed(0)
    return torch.randn(128, 64) * torch.linspace(0.1, 4, 64)


def test_views():
    tile = outlier_tile()
    views = picture.tile_views(tile)
    assert torch.equal(views.plain, tile)
    torch.testing.assert_close(views.rotated, tile @ hadamard(64, tile.device))
    unit = views.rotated / views.rotated.norm(dim=1, keepdim=True)
    span = unit.amax(0) - unit.amin(0)
    torch.testing.assert_close(views.normalized * span + unit.amin(0), unit)
    assert (views.normalized.amin(0) == 0).all() and (views.normalized.amax(0) == 1).all()


def test_the_normalized_view_is_what_four_bits_keep():
    tile = outlier_tile()
    cache = PackedCache.empty("k4v2_g128", 1, 1, 256, 64, torch.float32)
    for positions, k in ((torch.arange(128), tile), (torch.tensor([128]), tile[:1])):  # the second closes the tile
        cache.append(k[None, None], k[None, None], positions)
    stored = picture.tile_views(cache.unpack()[0][0, 0, :128]).normalized
    difference = (picture.tile_views(tile).normalized - stored).abs()
    assert 0.01 < difference.max() < 1.5 / 15


def test_most_uneven_finds_the_outlier_channel():
    torch.manual_seed(0)
    keys = [torch.randn(1, 3, 128, 16) for _ in range(4)]
    keys[2][0, 1, :, 5] *= 30
    assert picture.most_uneven(keys) == (2, 1)
