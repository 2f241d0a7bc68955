import inspect

import pytest
import torch
from drive import LOSSLESS
from torch._dynamo.utils import counters

import kvarn_compile
from kvarn_compile.binding import binding_of

transformers = pytest.importorskip("transformers")
from transformers import CompileConfig, StaticCache  # noqa: E402

from kvarn_compile import hf  # noqa: E402

KINDS = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
         "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}
STEPS = 4
# transformers 5 renames the argument on the way.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0,
          "eos_token_id": None}


def tiny(kind="llama", attention="sdpa", heads=4, kv_heads=2):
    """A model of random weights, scaled up so that no two logits are near a tie."""
    config, model = (getattr(transformers, name) for name in KINDS[kind])
    sliding = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3" else {}
    torch.manual_seed(0)
    return model(config(vocab_size=128, hidden_size=16 * heads, intermediate_size=96, num_hidden_layers=2, head_dim=32,
                        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=1024,
                        initializer_range=0.2, attn_implementation=attention, **sliding)).eval()


def tokens(batch, length, seed=0):
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def loop(call, cache, ids, steps=STEPS):
    """A decode loop of one's own: greedy tokens and logits."""
    chosen, logits = [], []
    with torch.no_grad():
        for _ in range(steps):
            logits.append(call(ids, **{CACHE: cache}).logits[:, -1].clone())  # CUDA graphs write over their outputs
            ids = logits[-1].argmax(-1, keepdim=True)
            chosen.append(ids)
    return torch.cat(chosen, 1), torch.stack(logits)


def assert_same(plain, packed):
    assert torch.equal(plain[0], packed[0])
    torch.testing.assert_close(plain[1], packed[1], atol=1e-4, rtol=1e-4)


def packed_layers(cache):
    return [bool(layer.is_initialized and binding_of(layer.keys)) for layer in cache.layers]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 129)])
def test_decode_loop(kind, attention, batch, length):
    model, ids = tiny(kind, attention), tokens(batch, length)
    plain, packed = (StaticCache(config=model.config, max_cache_len=320) for _ in range(2))
    expected = loop(model, plain, ids)
    assert_same(expected, loop(torch.compile(model, backend="kvarn", options=LOSSLESS), packed, ids))
    assert packed_layers(packed)[-1]


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1), (7, 1)])
@pytest.mark.parametrize("length", [127, 128, 300])
def test_head_groups_and_tile_edges(heads, kv_heads, length):
    model, ids = tiny(heads=heads, kv_heads=kv_heads), tokens(1, length)
    plain, packed = (StaticCache(config=model.config, max_cache_len=320) for _ in range(2))
    assert_same(loop(model, plain, ids), loop(torch.compile(model, backend="kvarn", options=LOSSLESS), packed, ids))
    assert all(packed_layers(packed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "compile_config"])
def test_generate(kind, how):
    model, ids = tiny(kind), tokens(2, 130)
    expected = model.generate(ids, **GREEDY)
    assert not counters["kvarn"]
    if how == "torch.compile":
        out = torch.compile(model, backend="kvarn", options=LOSSLESS).generate(ids, **GREEDY)
        assert model._compiled_call_impl is None
    elif how == "model.compile":
        model.compile(backend="kvarn", options=LOSSLESS)
        out = model.generate(ids, **GREEDY)
    else:
        config = CompileConfig(backend="kvarn", options=LOSSLESS, mode=None)
        config._compile_all_devices = True
        out = model.generate(ids, compile_config=config, **GREEDY)
    assert torch.equal(out, expected)
    assert counters["kvarn"]["attention_rewritten"] >= 1
    if how != "compile_config" and kind != "gemma3":  # the prompt is packed too: its cache is there before the call
        assert counters["kvarn"]["attention_refused"] == 0


def test_generate_of_other_backends_is_unchanged():
    model = tiny()
    assert torch.compile(model, backend="eager").generate.__self__ is model
    with pytest.raises(AttributeError):
        _ = torch.compile(torch.nn.Linear(2, 2), backend="kvarn").generate


def test_a_compiled_model_is_not_compiled_again_by_generate():
    model = tiny()
    hf.install()
    model.compile(backend="kvarn", options=LOSSLESS)
    assert model.get_compiled_call(None) == model.__call__
    other = tiny()
    other.compile(backend="eager")
    assert other.get_compiled_call(CompileConfig(backend="eager", mode=None)) != other.__call__


@pytest.mark.parametrize("kind", KINDS)
def test_empty_static_cache(kind):
    model, ids = tiny(kind), tokens(2, 130)
    cache = hf.empty_static_cache(model.config, 2, 320, torch.float32)
    expected = loop(model, StaticCache(config=model.config, max_cache_len=320), ids)
    assert_same(expected, loop(torch.compile(model, backend="kvarn", options=LOSSLESS), cache, ids))
    assert packed_layers(cache)[-1]
    assert cache.layers[-1].keys.shape == (2, 2, 320, 32)


def test_reset_and_second_prompt():
    model, ids = tiny(), tokens(1, 140)
    plain, packed = (StaticCache(config=model.config, max_cache_len=320) for _ in range(2))
    call = torch.compile(model, backend="kvarn", options=LOSSLESS)
    for runner, cache in ((model, plain), (call, packed)):
        loop(runner, cache, ids)
        cache.reset()
    store = binding_of(packed.layers[0].keys).store
    assert store.lengths.tolist() == [0] and not store.records.any()
    assert_same(loop(model, plain, tokens(1, 20, 5)), loop(call, packed, tokens(1, 20, 5)))


@pytest.mark.skipif(not hasattr(transformers.cache_utils.StaticLayer, "crop"), reason="static caches cannot crop")
def test_crop():
    model, ids = tiny(), tokens(1, 140)
    plain, packed = (StaticCache(config=model.config, max_cache_len=320) for _ in range(2))
    call = torch.compile(model, backend="kvarn", options=LOSSLESS)
    for runner, cache in ((model, plain), (call, packed)):
        loop(runner, cache, ids)
        cache.crop(-50)
    assert_same(loop(model, plain, tokens(1, 9, 5)), loop(call, packed, tokens(1, 9, 5)))


def test_reorder_for_beam_search():
    model, ids, rows = tiny(), tokens(3, 140), torch.tensor([2, 0, 0])
    plain, packed = (StaticCache(config=model.config, max_cache_len=320) for _ in range(2))
    call = torch.compile(model, backend="kvarn", options=LOSSLESS)
    for runner, cache in ((model, plain), (call, packed)):
        loop(runner, cache, ids)
        cache.reorder_cache(rows)
    assert_same(loop(model, plain, tokens(3, 1, 5)), loop(call, packed, tokens(3, 1, 5)))
    assert all(packed_layers(packed))


def test_eager_step_on_a_packed_cache():
    model, ids = tiny(), tokens(2, 140)
    plain, packed = (StaticCache(config=model.config, max_cache_len=320) for _ in range(2))
    call = torch.compile(model, backend="kvarn", options=LOSSLESS)
    loop(model, plain, ids), loop(call, packed, ids)
    for more, runner in ((tokens(2, 5, 5), model), (tokens(2, 1, 6), call)):
        assert_same(loop(model, plain, more), loop(runner, packed, more))
    assert all(packed_layers(packed))


def test_offload_gives_the_content_back():
    model = tiny()
    plain, packed = (StaticCache(config=model.config, max_cache_len=200) for _ in range(2))
    loop(model, plain, tokens(1, 140))
    loop(torch.compile(model, backend="kvarn", options=LOSSLESS), packed, tokens(1, 140))
    packed.layers[0].offload()
    torch.testing.assert_close(packed.layers[0].keys, plain.layers[0].keys, atol=1e-4, rtol=1e-4)
    assert packed_layers(packed) == [False, True]
    assert kvarn_compile.release(packed) == 1


def test_explain_names_the_layers():
    model = tiny("gemma3")
    with torch.no_grad():
        cache = hf.empty_static_cache(model.config, 1, 320, torch.float32)
        result = kvarn_compile.explain(model, tokens(1, 20), **{CACHE: cache})
    assert [row.rewritten for row in result.rows] == [False, True]
    assert result.rows[1].module == "model.layers.1.self_attn"


def test_overlapping_generate_calls_stay_compiled():
    from kvarn_compile.optimized import _compiled

    model = torch.nn.Linear(2, 2)
    compiled = torch.compile(model, backend="kvarn", options=LOSSLESS)
    plain = model._compiled_call_impl
    first, second = _compiled(model, compiled), _compiled(model, compiled)
    with first:
        inside = model._compiled_call_impl
        second.__enter__()
    assert model._compiled_call_impl is inside is not plain
    second.__exit__(None, None, None)
    assert model._compiled_call_impl is plain
