"""The compiled model on a GPU: tokens, memory, what a freed cache answers, CUDA graphs, generate().

    pytest tests/compile/test_gpu.py
"""

import gc

import pytest
import torch
from test_hf import CACHE, GREEDY, loop, packed_layers, tokens
from torch._dynamo.utils import counters

import kvarn_compile
from kvarn_compile.binding import binding_of

transformers = pytest.importorskip("transformers")
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache  # noqa: E402

from kvarn_compile import hf  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

EAGER = {"preset": "k16v16", "inner": "eager"}
INDUCTOR = {"preset": "k16v16"}
GRAPHS = {"preset": "k16v16", "mode": "reduce-overhead"}
LAYERS, HEADS, DIM, CAPACITY = 2, 2, 64, 320
MB = 2**20


def tiny(dtype=torch.float32, scale=0.2):
    """With weights this large no two logits are near a tie."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, head_dim=DIM,
                         num_attention_heads=4, num_key_value_heads=HEADS, max_position_embeddings=1 << 17,
                         initializer_range=scale)
    return LlamaForCausalLM(config).to("cuda", dtype).eval()


def compiled(model, options):
    return torch.compile(model, backend="kvarn", options=options)


def plain_cache(model, capacity=CAPACITY):
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    cache.early_initialization(1, HEADS, DIM, model.dtype, torch.device("cuda"))
    return cache


def empty_cache(model, capacity=CAPACITY):
    return hf.empty_static_cache(model.config, 1, capacity, model.dtype, "cuda")


def allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def plain_bytes(model, capacity):
    return 2 * LAYERS * HEADS * capacity * DIM * model.dtype.itemsize


def stores(cache):
    return [binding_of(layer.keys).store for layer in cache.layers]


def test_quantized_logits_are_close_to_the_plain_ones():
    model, ids = tiny(torch.float16, 0.02), tokens(1, 200).cuda()
    pieces = [ids[:, :150], *ids[:, 150:].split(1, 1)]
    call, caches = compiled(model, {"inner": "eager"}), (plain_cache(model), empty_cache(model))
    with torch.no_grad():
        plain, packed = (torch.stack([f(piece, **{CACHE: cache}).logits[:, -1].float() for piece in pieces])
                         for f, cache in zip((model, call), caches, strict=True))
    assert 0 < (packed - plain).norm() / plain.norm() < 0.2


def test_packing_gives_memory_back():
    model, capacity = tiny(torch.float16), 1 << 16
    loop(model, plain_cache(model), tokens(1, 1).cuda(), 2)  # what libraries allocate once
    cache, call = plain_cache(model, capacity), compiled(model, {"inner": "eager"})
    before = allocated()
    loop(call, cache, tokens(1, 1).cuda(), 2)
    fallen = before - allocated()
    packed = sum(store.nbytes for store in stores(cache))
    assert abs(fallen - (plain_bytes(model, capacity) - packed)) < MB
    assert kvarn_compile.release(cache) == LAYERS
    assert abs(allocated() - before) < MB


def test_an_empty_cache_is_never_plain():
    model, capacity = tiny(torch.float16), 1 << 16
    loop(model, plain_cache(model), tokens(1, 1).cuda(), 2)
    before = allocated()
    cache, call = empty_cache(model, capacity), compiled(model, {"inner": "eager"})
    cache.reset()
    assert allocated() - before < MB
    torch.cuda.reset_peak_memory_stats()
    loop(call, cache, tokens(1, 1).cuda(), 2)
    packed = sum(store.nbytes for store in stores(cache))
    assert packed < torch.cuda.max_memory_allocated() - before < packed + plain_bytes(model, capacity) / 4


READS = {"sum": lambda t: t.sum(), "slice": lambda t: t[0, 0].clone(), "pointer": lambda t: t.data_ptr(),
         "write": lambda t: t.zero_(), "eager graph": lambda t: torch.compile(lambda x: x + 1, backend="eager")(t)}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_freed_cache_answers_with_words(read):
    model = tiny()
    cache = empty_cache(model)
    with pytest.raises(RuntimeError, match="has no memory yet"):
        read(cache.layers[0].keys)
    loop(compiled(model, EAGER), cache, tokens(1, 9).cuda(), 2)
    for tensor in (cache.layers[0].keys, cache.layers[1].values):
        with pytest.raises(RuntimeError, match="packed kvarn store"):
            read(tensor)
    torch.cuda.synchronize()


def test_release_gives_the_plain_tensors_back():
    model, ids = tiny(), tokens(1, 140).cuda()
    plain, packed = plain_cache(model), empty_cache(model)
    loop(model, plain, ids), loop(compiled(model, EAGER), packed, ids)
    assert kvarn_compile.release(packed) == LAYERS
    for ours, theirs in zip(packed.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-3, rtol=1e-3)
    assert torch.equal(loop(model, plain, ids[:, :3])[0], loop(model, packed, ids[:, :3])[0])


def test_an_empty_cache_works_uncompiled():
    model, ids = tiny(), tokens(1, 20).cuda()
    expected, cache = loop(model, plain_cache(model), ids), empty_cache(model)
    assert torch.equal(expected[0], loop(model, cache, ids)[0])
    fresh = empty_cache(model)
    assert kvarn_compile.release(fresh) == 0 and not fresh.layers[0].keys.any()


def test_generate_compiles_by_itself():
    model, ids = tiny(), tokens(2, 130).cuda()
    config = CompileConfig(backend="kvarn", options=EAGER, mode=None)
    expected = model.generate(ids, disable_compile=True, **GREEDY)
    assert torch.equal(expected, model.generate(ids, compile_config=config, **GREEDY))
    assert counters["kvarn"]["attention_rewritten"]


@pytest.mark.parametrize("options, make", [(EAGER, plain_cache), (INDUCTOR, plain_cache), (GRAPHS, empty_cache)],
                         ids=["eager", "inductor", "graphs"])
def test_lossless_gives_the_plain_tokens(options, make):
    model = tiny()
    plain, packed, call = plain_cache(model), make(model), compiled(model, options)
    for seed in (1, 2):
        ids = tokens(1, 129, seed).cuda()
        expected, got = loop(model, plain, ids, 6), loop(call, packed, ids, 6)
        assert torch.equal(expected[0], got[0])
        torch.testing.assert_close(expected[1], got[1], atol=1e-3, rtol=1e-3)
        assert packed_layers(packed) == [True] * LAYERS
        assert [store.lengths.tolist() for store in stores(packed)] == [[129 + 5]] * LAYERS
        plain.reset(), packed.reset()
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert bool(counters["inductor"]["cudagraph_recorded_non_static_inputs"]) == (options is GRAPHS)


def test_replayed_graphs_write_the_store():
    """Quantized, over a tile's edge: the logits of steps without inductor and graphs, which packed the prompt too."""
    from kvarn import decode_cuda  # needs Triton

    model, ids = tiny(torch.float16, 0.05), tokens(1, 137).cuda()
    eager, graphs = compiled(model, {"inner": "eager"}), compiled(model, {"mode": "reduce-overhead"})
    logits, caches = [], [empty_cache(model), empty_cache(model)]
    for cache, call in zip(caches, (eager, graphs), strict=True):
        decode_cuda._SIGNS.clear()  # as in a process whose first decode is a graph's
        with torch.no_grad():
            eager(ids[:, :120], **{CACHE: cache})
            steps = [call(piece, **{CACHE: cache}).logits[:, -1].float() for piece in ids[:, 120:].split(1, 1)]
            logits.append(torch.stack(steps))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"]
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 0.05  # float16 rounds differently in fused kernels
    assert [store.lengths.tolist() for cache in caches for store in stores(cache)] == [[137]] * 2 * LAYERS
    assert all(store.records[:, :, 0].any() and not store.records[:, :, 1:].any() for store in stores(caches[1]))


@pytest.mark.parametrize("options", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_generate(options):
    model = tiny()
    call, settings = compiled(model, options), {**GREEDY, "max_new_tokens": 6}
    for seed in (1, 2):
        ids = tokens(2, 130, seed).cuda()
        assert torch.equal(model.generate(ids, disable_compile=True, **settings), call.generate(ids, **settings))
    assert counters["kvarn"]["attention_rewritten"] and counters["inductor"]["cudagraph_skips"] == 0
