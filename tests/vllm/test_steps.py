"""How a step is split, without asking the device: decodes, prompts with and without history, parts that fit."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
import torch
from serving import configure, greedy, layers, prompts
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from kvarn.paged import _open_pages, _tail
from kvarn.paged_layout import paged_layout
from kvarn.raw import read_raw
from kvarn.spec import PRESETS
from kvarn_compile.vllm import impl, limits
from kvarn_compile.vllm.metadata import TileMetadataBuilder
from kvarn_compile.vllm.prompts import Flash
from kvarn_compile.vllm.warmup import Shape, Step, decodes
from kvarn_compile.vllm.warmup import prompts as chunks


@pytest.fixture(scope="module")
def builder(llama):
    """A builder whose scratch takes 600 keys."""
    config = configure(llama, kv_cache_dtype="kvarn_k16v16")
    made = TileMetadataBuilder(SimpleNamespace(num_kv_heads=2), ["layer"], config, torch.device("cpu"))
    made._scratch_tokens = 600
    return made


def common(counts, lengths, padded=0):
    """vLLM's metadata of rows with `counts` new tokens and `lengths` in all; its device tensors refuse to be read."""
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    ends = torch.tensor(lengths).int()
    table = torch.arange(len(counts) * 8).view(-1, 8).int()
    return CommonAttentionMetadata(
        query_start_loc=starts.to("meta"), query_start_loc_cpu=starts, seq_lens=ends.to("meta"), num_reqs=len(counts),
        num_actual_tokens=int(starts[-1]) + padded, max_query_len=max(counts), max_seq_len=max(lengths),
        block_table_tensor=table.to("meta"), slot_mapping=starts.to("meta"), seq_lens_cpu_upper_bound=ends)


def test_decodes_only(builder):
    step = builder.build(0, common([1, 1, 1], [5, 300, 9], padded=5))
    assert step.tokens == 8
    assert (step.decodes.tokens, step.decodes.max_count, step.decodes.max_end) == (slice(0, 8), 1, 300)
    assert step.prompts == ()


def test_prompts_only(builder):
    step = builder.build(0, common([100, 30], [100, 30]))
    assert step.decodes is None
    (rows,) = step.prompts
    assert (rows.tokens, rows.max_count, rows.max_end, rows.fresh) == (slice(0, 130), 100, 100, True)
    assert rows.starts.shape == (3,)


def test_a_mixed_step(builder):
    step = builder.build(0, common([1, 1, 64, 20], [40, 50, 164, 20]))
    assert step.decodes.tokens == slice(0, 2)
    assert (step.decodes.table.shape, step.decodes.max_count) == ((2, 8), 1)
    (rows,) = step.prompts
    assert (rows.tokens, rows.max_count, rows.max_end, rows.fresh) == (slice(2, 86), 64, 164, False)


def test_parts_fit_the_scratch(builder):
    """Rows times the longest: 3 x 200; 450 alone, as 2 x 450 is too much; 2 x 100; a longer row stands alone."""
    lengths = [200, 200, 200, 450, 100, 100, 700]
    step = builder.build(0, common([50] * 7, lengths))
    assert [(rows.tokens.start // 50, rows.tokens.stop // 50, rows.max_end) for rows in step.prompts] == [
        (0, 3, 200), (3, 4, 450), (4, 6, 100), (6, 7, 700)]


def speculating(llama, monkeypatch, limit):
    monkeypatch.setattr(limits, "decode_tokens", lambda config, heads: 6 if limit >= 6 else 1)
    monkeypatch.setattr("kvarn_compile.vllm.metadata.decode_tokens", limits.decode_tokens)
    return configure(llama, kv_cache_dtype="kvarn_k16v16", speculative_config={
        "method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2})


@pytest.mark.parametrize("limit, support, rows", [(8, AttentionCGSupport.UNIFORM_BATCH, 2),
                                                  (4, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, 1)])
def test_drafts_are_decodes_if_the_kernel_takes_them(llama, monkeypatch, limit, support, rows):
    config, spec = speculating(llama, monkeypatch, limit), SimpleNamespace(num_kv_heads=2)
    assert TileMetadataBuilder.get_cudagraph_support(config, spec) == support
    made = TileMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))
    step = made.build(0, common([1, 6, 64], [40, 50, 64]))
    assert step.decodes.table.shape[0] == rows
    assert step.decodes.max_count == (6 if rows == 2 else 1)


def test_what_is_compiled_at_start_up():
    layout = paged_layout(PRESETS["k4v2_g128"].key, 64, torch.bfloat16)
    shape = Shape(layout, 4, 2, 0.125, rows=6, tokens=512, length=1000, decode=2, scratch=1512)
    assert {step.rows for step in decodes(shape)} == {1, 2, 4, 6}
    assert {step.count for step in decodes(shape)} == {1, 2}
    assert Step(6, 1, 1000) in decodes(shape)
    some = chunks(shape)
    assert Step(1, 512, 1000) in some  # the largest scratch
    assert {step.count > step.end - step.count > 0 for step in some} == {True, False}  # history that a chunk completes
    assert all(step.rows * step.count <= 512 and step.count <= step.end <= 1000 for step in some)


def varlen(q, k, v, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, fa_version):
    """What flash_attn_varlen_func computes: row b's queries are the last of its keys."""
    assert causal and (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()) == (max_seqlen_q, max_seqlen_k)
    for b in range(len(cu_seqlens_q) - 1):
        own, keys = (slice(*starts[b : b + 2].tolist()) for starts in (cu_seqlens_q, cu_seqlens_k))
        queries, all_keys, values = q[own].transpose(0, 1), k[keys].transpose(0, 1), v[keys].transpose(0, 1)
        n, total = queries.shape[1], all_keys.shape[1]
        mask = torch.ones(n, total, dtype=torch.bool).tril(total - n)
        out[own] = torch.nn.functional.scaled_dot_product_attention(
            queries[None], all_keys[None], values[None], mask, scale=softmax_scale, enable_gqa=True)[0].transpose(0, 1)


def unpack_raw(k, v, cache, table, starts, ends, balance, max_end, spec):
    """kvarn.paged_cuda.unpack_paged of the lossless preset."""
    layout, rows = paged_layout(spec, k.shape[-1], k.dtype), len(ends)
    to = torch.cat([ends.new_zeros(1), ends.cumsum(0)]).int()
    key, value = (k.new_empty(rows * max_end, *k.shape[1:]) for _ in range(2))
    for b in range(rows):
        end = ends[b : b + 1].long()
        opened, blocks = (end - 1) // layout.spec.group, table[b : b + 1].long()
        records = cache[blocks[:, : layout.tiles(int(end))]].transpose(1, 2).contiguous()
        tail = _tail(_open_pages(cache, blocks, opened, layout), end - opened * layout.spec.group, layout)
        for side, x in zip((key, value), read_raw(records, tail, end, layout.whole), strict=True):
            side[to[b] : to[b + 1]] = x[0, :, : int(end)].transpose(0, 1)
    return key, value, to


def test_prompts_by_flash_attention_are_stock_vllms(engines, llama, stock, monkeypatch):
    """With stand-ins for what only a GPU has: the same calls, and chunks read unpacked history."""
    seen = []

    def run(**arguments):
        seen.append(arguments["k"].data_ptr())
        varlen(**arguments)

    unpacked = []

    def unpack(*arguments):
        unpacked.append(arguments)
        return unpack_raw(*arguments)

    monkeypatch.setattr(impl.Flash, "of", staticmethod(lambda size, dtype, scale: Flash(run, 0, unpack, scale)))
    ours = engines(llama, kv_cache_dtype="kvarn_k16v16", max_num_batched_tokens=97)
    texts = prompts(300, 256, 50, 129, 1, seed=6)
    assert greedy(ours, texts, 10) == greedy(stock, texts, 10)
    assert all(layer.impl.flash.unpack is unpack for layer in layers(ours))
    assert 0 < len(unpacked) < len(seen)
