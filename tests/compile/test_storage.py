"""Memory is read from the kernel (/proc/self/smaps_rollup), in steps far above its noise."""

import sys

import numpy
import pytest
import torch

from kvarn_compile import empty_cache, storage

MB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident() -> int:
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Rss:"))


@linux
def test_freeing_returns_memory():
    cache = torch.ones(4, 8, 8192, 64)
    before = resident()
    storage.free(cache)
    assert before - resident() > 60 * MB


def test_freed_memory_reads_as_zeros_and_cannot_be_written():
    cache = torch.ones(2, 3, 1000, 7, dtype=torch.float16).transpose(1, 2)
    storage.free(cache)
    assert cache.shape == (2, 1000, 3, 7) and not cache.any()
    assert not torch.nn.functional.softmax(cache, -1).isnan().any()
    for write in (lambda: cache.zero_(), lambda: cache[0].fill_(1), lambda: cache.copy_(torch.ones_like(cache))):
        with pytest.raises(RuntimeError):
            write()


def test_neighbours_of_freed_memory_are_untouched():
    tensors = [torch.full((1, 1, 999, 3), float(i)) for i in range(20)]
    for tensor in tensors[::2]:
        storage.free(tensor)
    assert all((tensor == 0 if i % 2 == 0 else tensor == i).all() for i, tensor in enumerate(tensors))


def test_refill_keeps_object_and_strides():
    cache = torch.rand(2, 5, 3, 4).transpose(1, 2)
    content, strides = cache.clone(), cache.stride()
    storage.free(cache)
    storage.refill(cache, content)
    assert torch.equal(cache, content) and cache.stride() == strides
    cache.zero_()


@pytest.mark.parametrize("make, reason", [
    (lambda t: t, ""), (lambda t: t[0], "part of a larger"), (lambda t: t.view(-1), "another tensor shares"),
    (lambda t: torch.from_numpy(numpy.ones((2, 2))), "belongs to another library"),
    (lambda t: t.clone().share_memory_(), "shared with another process")])
def test_what_cannot_be_freed(make, reason):
    tensor = make(torch.ones(2, 3, 4, 5))
    assert reason in storage.why_not_free(tensor)
    assert bool(reason) == bool(storage.why_not_free(tensor))


@linux
def test_empty_cache_takes_no_memory():
    before = resident()
    caches = [empty_cache((4, 8, 8192, 64), torch.float32) for _ in range(4)]
    assert resident() - before < 8 * MB
    assert caches[0].nbytes == 64 * MB and caches[0].is_contiguous() and not caches[0][3, 7, -5:].any()
    assert all(storage.has_memory(cache) and not storage.why_not_free(cache) for cache in caches)


@linux
def test_a_husk_that_was_written_gives_its_pages_back():
    cache = empty_cache((4, 8, 8192, 64), torch.float32)
    cache.fill_(1.0)
    before = resident()
    storage.free(cache)
    assert before - resident() > 60 * MB
    assert not cache.any()  # pages of a shared mapping would have kept the ones


def test_parameters_stay():
    assert "parameter" in storage.why_not_free(torch.nn.Parameter(torch.zeros(2, 3, 4, 5), requires_grad=False))


def test_empty_cache_is_an_ordinary_tensor():
    cache = empty_cache((1, 2, 300, 8), torch.bfloat16)
    cache[:, :, 7] = 3
    assert cache.sum() == 48
    assert empty_cache((0, 2, 3, 4)).shape == (0, 2, 3, 4)
