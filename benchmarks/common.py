"""What every benchmark shares: timing, the card's copy bandwidth, random stores, CSV rows.

A benchmark checks its result first and raises if it is wrong; then it measures, prints a line and appends a row with
the card, the versions, the date and the commit. Times are medians of CUDA-graph replays, so launch gaps of Python do
not count.
"""

import datetime
import statistics

import torch
import triton
from rows import RESULTS, append, commit

from kvarn.cache import PackedCache
from kvarn.paged_layout import PagedLayout


def milliseconds(run, repeats: int = 15, inner: int = 4) -> float:
    """Median time of one call of `run`, captured `inner` times in a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a device-to-device copy of 2 GiB, in GB/s.

    Launched, not replayed: inside a CUDA graph the copy becomes a memcpy node, which runs slower.
    """
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    ms = triton.testing.do_bench(lambda: b.copy_(a), warmup=5, rep=30, return_mode="median")
    return 2 * a.numel() / ms / 1e6


def random_store(preset, rows: int, heads: int, tokens: int, dim: int, dtype=torch.bfloat16,
                 spare: int = 0) -> PackedCache:
    """A store whose rows hold `tokens` tokens each: 32 tiles of random content, repeated in random order."""
    cache = PackedCache.empty(preset, rows, heads, tokens + spare, dim, dtype, "cuda")
    group = cache.spec.group
    sample = PackedCache.empty(preset, 1, 1, 33 * group, dim, dtype, "cuda")
    k, v = (torch.randn(1, 1, 33 * group, dim, device="cuda", dtype=dtype) for _ in range(2))
    sample.append(k, v, torch.arange(33 * group, device="cuda"))
    tiles = sample.records[0, 0, :32]
    for row in cache.records:
        row.copy_(tiles[torch.randint(0, 32, row.shape[:2], device="cuda")])
    cache.tail.copy_(sample.tail[0, 0].expand_as(cache.tail))
    cache.lengths.fill_(tokens)
    return cache


def paged_store(store: PackedCache, tokens: int, spare: int = 0) -> tuple[torch.Tensor, torch.Tensor, PagedLayout]:
    """The same tokens as blocks in random order, with room for `spare` more: cache, table, layout."""
    layout = PagedLayout(store.spec, store.layout.head_dim, torch.bfloat16)
    rows, heads = store.records.shape[:2]
    tiles, width = layout.tiles(tokens), layout.blocks(tokens + spare)
    table = torch.randperm(rows * width, device="cuda").view(rows, width).int()
    cache = torch.zeros(rows * width, heads, layout.record_bytes, dtype=torch.uint8, device="cuda")
    cache[table[:, :tiles].long()] = store.records[:, :, :tiles].transpose(1, 2)
    for name, field in layout.whole.tail.items():
        whole = field.of(store.tail).transpose(1, 2)
        for page in range(layout.spare):
            part = whole[:, page * layout.page : (page + 1) * layout.page].transpose(1, 2)
            view = layout.tail[name].of(cache)
            view[table[:, tiles - 1 + layout.spare - page].long(), :, : part.shape[2]] = part
    return cache, table, layout


def where() -> dict[str, str]:
    """What each row says of its measurement: the card, versions, date and commit."""
    return {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "date": datetime.date.today().isoformat(), "commit": commit()}


def write_rows(name: str, rows: list[dict]) -> None:
    """Append rows to results/<name>.csv, each with where()."""
    here = where()
    append(RESULTS / f"{name}.csv", [row | here for row in rows])


def show(row: dict) -> None:
    """One line of figures."""
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
