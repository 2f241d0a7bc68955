"""A chunk of 8k tokens over 24k packed tokens under a causal mask, as transformers' static cache has it.

    python benchmarks/prefill.py       (under vLLM's Python also FlashAttention-3, on a Hopper GPU)

In one process on one card, over the same values: the op; what it does without blocks (PyTorch's attention with the
mask, one query head of each group at a time); PyTorch's attention without a mask; FlashAttention-3, causal. Each result
is checked before it is timed. Rows go to results/prefill.csv.
"""

import math

import torch
from common import milliseconds, random_store, show, write_rows

from kvarn import cuda
from kvarn.kernels import configs, unpack

try:
    from vllm.vllm_flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

ATTENTION = torch.nn.functional.scaled_dot_product_attention


def error_of(out, reference):
    error = float((out - reference).float().norm() / reference.float().norm())
    assert error < 2e-2, error
    return error


def flash(q, key, value):
    """FlashAttention-3 of [Hq, n, D] over [H, S, D], the queries the last of the keys; [n, Hq, D]."""
    q, key, value = (x.transpose(0, 1).contiguous() for x in (q, key, value))
    n, total = len(q), len(key)
    starts, to = (torch.tensor([0, end], device="cuda").int() for end in (n, total))
    return lambda: flash_attn_varlen_func(q, key, value, n, starts, total, cu_seqlens_k=to, causal=True,
                                          softmax_scale=q.shape[-1] ** -0.5, fa_version=3)


def row(heads=8, group=8, history=24576, n=8192, dim=128):
    total = history + n
    cache = random_store("k4v2_g128", 1, heads, history, dim, spare=n)
    k, v = (torch.randn(1, heads, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    at = torch.arange(history, total, device="cuda")
    cache.append(k, v, at)
    q = torch.randn(1, heads * group, n, dim, device="cuda", dtype=torch.bfloat16)
    mask = (torch.arange(total, device="cuda") <= at[:, None])[None, None]
    key, value = (torch.empty(1, heads, total, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    balance = cache.tensors()[3]

    def unpacked():
        unpack.unpack(k, v, at[None], *cache.tensors()[:3], balance, key, value, *configs.unpack(dim),
                      **configs.offsets(cache.layout))

    def op():
        return cache.attend(q, k, v, at, mask, total)

    unpacked()
    out, without_blocks = torch.empty_like(q), torch.empty_like(q)
    wide = mask.expand(1, heads * group, n, total)
    scale = dim**-0.5
    masked, unmasked = op(), ATTENTION(q, key, value, enable_gqa=True)
    cuda._sdpa(q, key, value, wide, False, scale, without_blocks)
    error = error_of(masked, without_blocks)
    error_of(cuda._masked(q, key, value, torch.ones_like(mask).expand_as(wide), scale, out), unmasked)
    times = {"ms": milliseconds(op, 5, 1), "unpack_ms": milliseconds(unpacked, 5, 1),
             "blocks_ms": milliseconds(lambda: cuda._masked(q, key, value, wide, scale, out), 5, 1),
             "sdpa_masked_ms": milliseconds(lambda: cuda._sdpa(q, key, value, wide, False, scale, out), 3, 1),
             "sdpa_unmasked_ms": milliseconds(lambda: ATTENTION(q, key, value, enable_gqa=True), 5, 1),
             "fa3_ms": math.nan}
    if flash_attn_varlen_func is not None:
        run = flash(q[0], key[0], value[0])
        error_of(run().transpose(0, 1), masked[0])
        times["fa3_ms"] = milliseconds(run, 5, 1)
    return {"history": history, "chunk": n, "kv_heads": heads, "group": group, "head_dim": dim, **times,
            "of_fa3": times["fa3_ms"] / times["ms"], "error": error}


def main():
    print(torch.cuda.get_device_name(), flush=True)
    rows = [row(), row(n=512), row(group=4, dim=256), row(dim=64)]
    for found in rows:
        show(found)
    write_rows("prefill", rows)


if __name__ == "__main__":
    main()
