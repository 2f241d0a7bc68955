"""Paged attention over packed tiles against FlashAttention-3 on a bf16 cache, in one process on one card.

    python benchmarks/against_fa3.py         (needs vLLM, whose FlashAttention-3 this is, and a Hopper GPU)

One token per row over its context, and a chunk of 8k tokens of one row over 24k packed ones. Each result is checked
against FlashAttention on the same values before it is timed. Rows go to results/against_fa3.csv.
"""

import torch
from common import copy_bandwidth, milliseconds, paged_store, random_store, show, write_rows
from vllm.vllm_flash_attn import flash_attn_varlen_func

from kvarn import decode_cuda, paged_cuda

DECODE = [  # batch, KV heads, query heads per KV head, tokens, head_dim
    (32, 8, 8, 16384, 128), (4, 8, 8, 32768, 128), (1, 8, 8, 32768, 128), (32, 8, 1, 16384, 128),
    (32, 8, 4, 16384, 128), (32, 8, 5, 16384, 128), (32, 8, 8, 16384, 64), (16, 8, 8, 16384, 256)]
BLOCK = 16
"""Tokens of a block of the bf16 cache: vLLM's default."""


def flash(q, key, value, table, starts, ends, max_count, max_end):
    """FlashAttention-3, as vLLM's backend calls it without CUDA graphs: it chooses the number of splits itself."""
    return flash_attn_varlen_func(q, key, value, max_count, starts, max_end, seqused_k=ends, causal=True,
                                  softmax_scale=q.shape[-1] ** -0.5, block_table=table, fa_version=3)


def plain_store(key, value, spare=0):
    """[B, H, n, D] twice as a bf16 paged cache in random order: key and value blocks, table."""
    rows, heads, n, dim = key.shape
    width = -(-(n + spare) // BLOCK)
    table = torch.randperm(rows * width, device="cuda").view(rows, width).int()
    blocks = torch.zeros(2, rows * width, BLOCK, heads, dim, device="cuda", dtype=torch.bfloat16)
    for half, x in zip(blocks, (key, value), strict=True):
        padded = torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, width * BLOCK - n))
        half[table.flatten().long()] = padded.reshape(-1, BLOCK, heads, dim)
    return *blocks, table


def error_of(out, reference):
    error = float((out - reference).float().norm() / reference.float().norm())
    assert error < 2e-2, error
    return error


def decode_row(shape, bandwidth):
    batch, heads, group, tokens, dim = shape
    store = random_store("k4v2_g128", batch, heads, tokens, dim)
    cache, table, layout = paged_store(store, tokens)
    key, value = (x[:, :, :tokens].bfloat16() for x in store.unpack())
    plain = plain_store(key, value)
    del key, value
    q = torch.randn(batch, heads * group, dim, device="cuda", dtype=torch.bfloat16)
    starts, ends = torch.arange(batch + 1, device="cuda").int(), torch.full((batch,), tokens, device="cuda").int()
    out = torch.empty_like(q)

    def ours():
        return decode_cuda.decode_paged(q, cache, table, starts, ends, store.balance, 1, tokens, dim**-0.5, layout, out)

    def theirs():
        return flash(q, *plain, starts, ends, 1, tokens)

    error = error_of(ours(), theirs())
    ms, fa3 = milliseconds(ours), milliseconds(theirs)
    return {"what": "decode", "batch": batch, "kv_heads": heads, "group": group, "tokens": tokens, "head_dim": dim,
            "ms": ms, "fa3_ms": fa3, "times_faster": fa3 / ms, "copy_gb_s": bandwidth,
            "fa3_gb_s": 4 * batch * heads * tokens * dim / fa3 / 1e6, "error": error}


def chunk_row(bandwidth, heads=8, group=8, history=24576, n=8192, dim=128):
    total = history + n
    store = random_store("k4v2_g128", 1, heads, history, dim)
    cache, table, layout = paged_store(store, history, n)
    k, v = (torch.randn(n, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(n, heads * group, dim, device="cuda", dtype=torch.bfloat16)
    starts, ends = torch.tensor([0, n], device="cuda").int(), torch.tensor([total], device="cuda").int()
    where = cache, table, starts, ends, store.balance
    paged_cuda.append_paged_cuda(k, v, *where, layout.spec.key)

    to = torch.tensor([0, total], device="cuda").int()

    def unpacked():
        return paged_cuda.unpack_paged(k, v, *where[:4], to, where[4], total, total, layout.spec.key)

    key, value = unpacked()
    plain = plain_store(key.transpose(0, 1)[None, :, :total], value.transpose(0, 1)[None, :, :total])

    def ours():
        return flash_attn_varlen_func(q, *unpacked(), n, starts, total, cu_seqlens_k=to, causal=True,
                                      softmax_scale=dim**-0.5, fa_version=3)

    def theirs():
        return flash(q, *plain, starts, ends, n, total)

    error = error_of(ours(), theirs())
    ms, fa3 = milliseconds(ours, 7, 1), milliseconds(theirs, 7, 1)
    return {"what": "chunk of 8k", "batch": 1, "kv_heads": heads, "group": group, "tokens": total, "head_dim": dim,
            "ms": ms, "fa3_ms": fa3, "times_faster": fa3 / ms, "copy_gb_s": bandwidth, "fa3_gb_s": float("nan"),
            "error": error}


def main():
    bandwidth, rows = copy_bandwidth(), []
    print(torch.cuda.get_device_name(), f"copy {bandwidth:.0f} GB/s", flush=True)
    for shape in DECODE:
        rows.append(decode_row(shape, bandwidth))
        show(rows[-1])
    rows.append(chunk_row(bandwidth))
    show(rows[-1])
    write_rows("against_fa3", rows)


if __name__ == "__main__":
    main()
