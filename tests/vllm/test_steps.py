"""How a step is split, without asking the device: decodes, prompts with and without history, parts that fit."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
import torch
from serving import configure, greedy, layers, prompts
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from kvarn.paged import _open_pages, _tail
from kvarn.paged_layout import paged_layout
from kvarn.raw import read_raw
from kvarn.spec import PRESETS
from kvarn_compile.vllm import impl, warmup
from kvarn_compile.vllm.backend import KVarnBackend
from kvarn_compile.vllm.metadata import TileMetadataBuilder
from kvarn_compile.vllm.prompts import Flash
from kvarn_compile.vllm.warmup import Shape, Step, decodes
from kvarn_compile.vllm.warmup import prompts as chunks

TARGET, DRAFT = "model.layers.0.self_attn.attn", "draft_model.model.layers.0.self_attn.attn"


class Layer(AttentionLayerBase):
    """What is asked of an attention layer."""

    def __init__(self, num_heads, num_kv_heads):
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads

    def get_attn_backend(self):
        return KVarnBackend

    def get_kv_cache_spec(self, vllm_config):
        return None


def build_for(config, *names, **heads):
    """A builder for the layers of these names in an engine of `config`, which has 4 query heads and 2 KV heads."""
    for name in (TARGET, DRAFT):
        config.compilation_config.static_forward_context[name] = Layer(*heads.get(name.split(".")[0], (4, 2)))
    return TileMetadataBuilder(SimpleNamespace(), list(names), config, torch.device("cpu"))


@pytest.fixture(scope="module")
def builder(llama):
    """A builder whose scratch takes 600 keys."""
    made = build_for(configure(llama, kv_cache_dtype="kvarn_k16v16"), TARGET)
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
    assert (step.decodes.tokens, step.decodes.max_count, step.decodes.max_end) == (slice(0, 8), 1, 300)
    assert step.prompts == ()


def test_prompts_only(builder):
    step = builder.build(0, common([100, 30], [100, 30]))
    assert step.decodes is None
    (rows,) = step.prompts
    assert (rows.tokens, rows.max_count, rows.max_end, rows.key_starts) == (slice(0, 130), 100, 100, None)
    assert rows.starts.shape == (3,)


def test_a_mixed_step(builder):
    step = builder.build(0, common([1, 1, 64, 20], [40, 50, 164, 20]))
    assert step.decodes.tokens == slice(0, 2)
    assert (step.decodes.table.shape, step.decodes.max_count) == ((2, 8), 1)
    (rows,) = step.prompts
    assert (rows.tokens, rows.max_count, rows.max_end, rows.keys) == (slice(2, 86), 64, 164, 184)
    assert rows.key_starts.shape == (3,)


def test_parts_fit_the_scratch(builder):
    """Rows times the longest: 3 x 200; 450 alone, as 2 x 450 is too much; 2 x 100; a longer row stands alone."""
    lengths = [200, 200, 200, 450, 100, 100, 700]
    step = builder.build(0, common([50] * 7, lengths))
    assert [(rows.tokens.start // 50, rows.tokens.stop // 50, rows.max_end) for rows in step.prompts] == [
        (0, 3, 200), (3, 4, 450), (4, 6, 100), (6, 7, 700)]


def test_fresh_prompts_are_one_part(builder):
    """Nothing of them is unpacked, so that the scratch does not bound them; with one that has history it does."""
    counts = [30] * 20 + [500]
    (rows,) = builder.build(0, common(counts, counts)).prompts
    assert (rows.tokens, rows.keys, rows.key_starts) == (slice(0, 1100), 1100, None)
    parts = builder.build(0, common([200, *counts], [300, *counts])).prompts
    assert [(part.tokens, part.key_starts is None) for part in parts] == [
        (slice(0, 230), False), (slice(230, 1300), True)]


class Seen(TorchDispatchMode):
    """The operators called on tensors of a device, by name."""

    def __init__(self, device):
        super().__init__()
        self.device, self.names = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type == self.device:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts, lengths, views", [
    ([1, 1, 1], [5, 300, 9], True), ([100, 30], [100, 30], True), ([1, 1, 20, 64], [40, 50, 20, 64], True),
    ([1, 1, 64, 20], [40, 50, 164, 20], False)])
def test_a_step_is_views_unless_it_has_history(builder, counts, lengths, views):
    """What a device has to do for the metadata of a step: nothing, but where to unpack history."""
    given = common(counts, lengths)
    with Seen("meta") as seen:
        builder.build(0, given)
    assert (set(seen.names) == {"aten.slice.Tensor"}) == views


def with_draft_model(llama):
    return configure(llama, kv_cache_dtype="kvarn_k16v16", speculative_config={
        "method": "draft_model", "model": str(llama), "num_speculative_tokens": 3})


def test_a_draft_model_has_a_token_more_than_the_host_knows(llama):
    """vLLM lengthens its rows on the device alone: sizes that follow from the host's lengths would be too small."""
    for names, end, fresh in (([DRAFT], 101, True), ([TARGET, DRAFT], 100, False)):
        (rows,) = build_for(with_draft_model(llama), *names).build(0, common([101], [100])).prompts
        assert (rows.max_end, rows.keys, rows.key_starts is None) == (end, end, fresh)


@pytest.mark.parametrize("names, rows", [([DRAFT], 2), ([TARGET, DRAFT], 0), ([TARGET], 0)])
def test_a_draft_models_first_pass_is_of_decodes(llama, names, rows):
    """Its rows have one token more than the target's, which may be 4; a longer one stays a prompt."""
    step = build_for(with_draft_model(llama), *names).build(0, common([5, 5, 6], [40, 50, 60]))
    assert (len(step.decodes.ends) if step.decodes else 0) == rows
    assert sum(len(part.ends) for part in step.prompts) == 3 - rows


def on_a_gpu(config, monkeypatch, query_rows):
    """`config` as a GPU's, whose decode kernel takes that many query rows."""
    monkeypatch.setattr(config.device_config, "device_type", "cuda")
    monkeypatch.setattr("kvarn.kernels.configs.DECODE_ROWS", query_rows)
    return config


@pytest.mark.parametrize("query_rows, support, rows", [(16, AttentionCGSupport.UNIFORM_BATCH, 2),
                                                       (8, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, 1)])
def test_drafts_are_decodes_if_the_kernel_takes_them(llama, monkeypatch, query_rows, support, rows):
    pytest.importorskip("triton", reason="Triton is not installed")
    config = on_a_gpu(configure(llama, kv_cache_dtype="kvarn_k16v16", speculative_config={
        "method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2}), monkeypatch, query_rows)
    made = build_for(config, TARGET)
    assert TileMetadataBuilder.get_cudagraph_support(config, SimpleNamespace()) == support
    step = made.build(0, common([1, 6, 64], [40, 50, 64]))
    assert step.decodes.table.shape[0] == rows
    assert step.decodes.max_count == (6 if rows == 2 else 1)


@pytest.mark.parametrize("query_rows, target, draft", [(80, 4, 5), (64, 4, 4), (48, 4, 1)])
def test_each_model_has_its_own_query_heads(llama, monkeypatch, query_rows, target, draft):
    """16 per KV head in the draft, 2 in the target: its decodes, and what can be captured, are as without the draft."""
    pytest.importorskip("triton", reason="Triton is not installed")
    config = on_a_gpu(with_draft_model(llama), monkeypatch, query_rows)
    heads = {"draft_model": (16, 1)}
    assert build_for(config, TARGET, **heads).reorder_batch_threshold == target
    assert build_for(config, DRAFT, **heads).reorder_batch_threshold == draft
    spec = SimpleNamespace(num_kv_heads=1)  # of the draft's layers
    assert TileMetadataBuilder.get_cudagraph_support(config, spec) == AttentionCGSupport.UNIFORM_BATCH
    layout = paged_layout(PRESETS["k4v2_g128"].key, 64, torch.bfloat16)
    assert Shape.of(config, layout, 16, 1, 0.125).decode == draft


def test_what_is_compiled_at_start_up():
    layout = paged_layout(PRESETS["k4v2_g128"].key, 64, torch.bfloat16)
    shape = Shape(layout, 4, 2, 0.125, rows=6, tokens=512, length=1000, decode=2, scratch=1512)
    assert {step.rows for step in decodes(shape)} == {1, 2, 4, 6}
    assert {step.count for step in decodes(shape)} == {1, 2}
    assert Step(6, 1, 1000) in decodes(shape)
    some = chunks(shape)
    assert max(step.rows * step.end for step in some if step.end > step.count) == 1512  # the largest scratch
    assert {step.count > step.end - step.count > 0 for step in some} == {True, False}  # history that a chunk completes
    assert all(step.rows * step.count <= 512 and step.count <= step.end <= 1000 for step in some)


def test_every_engine_runs_its_own_warm_up(llama, monkeypatch):
    """Kernels that another one compiled are there, but the scratch has to show in this one's profile run."""
    names, ran = [configure(llama, kv_cache_dtype="kvarn_k4v2_g128").instance_id for _ in range(2)], []
    monkeypatch.setattr(warmup, "_run", lambda step, *args: ran.append(step))
    layout = paged_layout(PRESETS["k4v2_g128"].key, 64, torch.bfloat16)
    shape = Shape(layout, 4, 2, 0.125, rows=6, tokens=512, length=1000, decode=2, scratch=1512)
    for name in (names[0], names[0], names[1]):
        warmup.compile_kernels(name, shape, None, torch.device("cpu"))
    assert ran == 2 * (decodes(shape) + chunks(shape))


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


def unpack_raw(k, v, cache, table, starts, ends, to, balance, size, max_end, spec):
    """kvarn.paged_cuda.unpack_paged of the lossless preset."""
    layout = paged_layout(spec, k.shape[-1], k.dtype)
    key, value = (k.new_empty(size, *k.shape[1:]) for _ in range(2))
    for b in range(len(ends)):
        end = ends[b : b + 1].long()
        opened, blocks = (end - 1) // layout.spec.group, table[b : b + 1].long()
        records = cache[blocks[:, : layout.tiles(int(end))]].transpose(1, 2).contiguous()
        tail = _tail(_open_pages(cache, blocks, opened, layout), end - opened * layout.spec.group, layout)
        for side, x in zip((key, value), read_raw(records, tail, end, layout.whole), strict=True):
            side[to[b] : to[b + 1]] = x[0, :, : int(end)].transpose(0, 1)
    return key, value


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


def test_a_layer_slices_nothing(engines, llama, monkeypatch):
    """Outside CUDA graphs a layer's host time is a step's: an append, the decodes and the prompts, all of them on the
    step's own tensors, padding included."""
    calls = []
    monkeypatch.setattr(impl.Flash, "of", staticmethod(
        lambda size, dtype, scale: Flash(lambda **given: calls.append(given), 0, unpack_raw, scale)))
    llm = engines(llama, kv_cache_dtype="kvarn_k16v16", max_num_batched_tokens=98)
    layer = layers(llm)[0]
    monkeypatch.setattr(layer.impl, "decode", lambda q, *rest: calls.append({"q": q, "out": rest[-1]}))
    made = build_for(configure(llama, kv_cache_dtype="kvarn_k16v16"), TARGET)
    m = common([1, 20], [5, 20])
    m.query_start_loc, m.seq_lens, m.block_table_tensor = (
        m.query_start_loc_cpu, m.seq_lens_cpu_upper_bound, torch.arange(1, 17).view(2, 8).int())
    q, out = torch.zeros(32, 4, 64), torch.zeros(32, 4, 64)
    k, v = torch.zeros(32, 2, 64), torch.zeros(32, 2, 64)
    layer.impl.forward(layer, q, k, v, layer.kv_cache, None, out)
    step = made.build(0, m)
    with Seen("cpu") as seen:
        layer.impl.forward(layer, q, k, v, layer.kv_cache, step, out)
    assert seen.names == ["aten.squeeze.dim", "kvarn.append_paged.default"]
    assert [(call["q"] is q, call["out"] is out) for call in calls] == [(True, True)] * 2
    assert calls[1]["cu_seqlens_q"].tolist() == [1, 21]
