"""Quantized presets: how many tokens the same memory holds, and how close the model stays to itself."""

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
from types import SimpleNamespace

import small_models
import torch
from safetensors.torch import save_file
from serving import configure, free_blocks, greedy, prompts
from transformers import AutoModelForCausalLM

from kvarn import SpecError
from kvarn.balance import from_weights
from kvarn.paged_layout import paged_layout
from kvarn.spec import PRESETS
from kvarn_compile.vllm import balance
from kvarn_compile.vllm.settings import Settings


def capacity(llm):
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks, cache.kv_cache_size_tokens


@pytest.mark.parametrize("preset, times", [("k4v2_g128", 4.55), ("k4v4_g128", 3.5), ("k8v8_g128", 1.85)])
def test_capacity(engines, llama, preset, times):
    """Against bfloat16 at head size 64, in blocks of one tile; vLLM's own figure counts the open tile's blocks."""
    stock = engines(llama, dtype="bfloat16")
    ours = engines(llama, dtype="bfloat16", kv_cache_dtype=f"kvarn_{preset}")
    layout = paged_layout(PRESETS[preset].key, 64, torch.bfloat16)
    per_block = capacity(stock)[0] * stock.llm_engine.vllm_config.cache_config.block_size
    assert capacity(ours)[0] * 128 / per_block > times
    assert capacity(ours)[1] == int(capacity(ours)[0] / layout.blocks(512) * 512)


def loss(llm, texts):
    """Mean negative log probability of the prompts' own tokens."""
    outputs = greedy(llm, texts, 1, prompt_logprobs=0, full=True)
    values = [next(iter(step.values())).logprob for output in outputs for step in output.prompt_logprobs[1:]]
    return -torch.tensor(values)


def test_closeness(engines, smooth):
    """Prompts go in chunks of 64, so that every token reads rounded tiles. More bits are closer to stock vLLM."""
    texts = prompts(400, 500, seed=1)
    stock = loss(engines(smooth, max_num_batched_tokens=64), texts)
    difference = {}
    for preset in ("k16v16", "k8v8_g128", "k4v4_g128", "k4v2_g128"):
        ours = loss(engines(smooth, max_num_batched_tokens=64, kv_cache_dtype=f"kvarn_{preset}"), texts)
        difference[preset] = float((ours - stock).abs().mean() / stock.std())
    assert list(difference.values()) == sorted(difference.values())
    assert difference["k16v16"] < 1e-3 < difference["k8v8_g128"] < 0.03
    assert difference["k4v2_g128"] < 0.5


def test_preempted_sequences_come_to_their_end(engines, llama):
    tiny = engines(llama, kv_cache_dtype="kvarn_k4v2_g128", num_gpu_blocks_override=13, max_num_seqs=4)
    before = free_blocks(tiny)
    assert all(len(tokens) == 40 for tokens in greedy(tiny, prompts(120, 126, 100, 128, seed=3), 40))
    assert free_blocks(tiny) == before


def test_balanced_keys_from_a_file(engines, smooth, tmp_path):
    """Any scale in the file leaves the scores as they are, up to other rounding; each layer reads its own."""
    file = tmp_path / "balance.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({f"layers.{i}": torch.rand(2, 64, generator=generator) + 0.5 for i in range(2)}, file)
    texts = prompts(400, 500, seed=2)
    stock = loss(engines(smooth, max_num_batched_tokens=64), texts)
    off, on = (loss(engines(smooth, max_num_batched_tokens=64, attention_backend="CUSTOM", additional_config={
        "kvarn": {"preset": "k8v8_g128", "balance": source}}), texts) for source in ("off", str(file)))
    assert not torch.equal(off, on)
    for ours in (off, on):
        assert float((ours - stock).abs().mean() / stock.std()) < 0.03


def test_balanced_keys_from_weights(engines, tmp_path_factory, monkeypatch):
    """A Qwen2's keys have a bias: by default each layer's scale is that of its weights, and tokens come out closer."""
    said = []
    monkeypatch.setattr(balance, "logger", SimpleNamespace(info_once=said.append))
    folder = small_models.write(tmp_path_factory.mktemp("qwen"), "qwen2", hidden=256, attention=0.5)
    texts, options = prompts(400, 500, seed=4), {"max_num_batched_tokens": 64}
    stock = loss(engines(folder, **options), texts)
    default = engines(folder, kv_cache_dtype="kvarn_k4v2_g128", **options)
    off = engines(folder, attention_backend="CUSTOM", additional_config={"kvarn": {"balance": "off"}}, **options)
    assert said == ["kvarn: keys of 2 layers are balanced by their projections' weights."]
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, layer in enumerate(default.llm_engine.vllm_config.compilation_config.static_forward_context.values()):
        query, key = (getattr(state.model.layers[index].self_attn, f"{name}_proj") for name in "qk")
        expected = from_weights(key.weight, key.bias, state.model.layers[index].input_layernorm.weight,
                                state.model.rotary_emb.inv_freq, 128, query.weight, query.bias)
        torch.testing.assert_close(layer.impl.balance, expected.detach(), rtol=1e-4, atol=1e-5)
    error = {name: float((loss(llm, texts) - stock).abs().mean()) for name, llm in (("off", off), ("on", default))}
    for layer in off.llm_engine.vllm_config.compilation_config.static_forward_context.values():
        assert (layer.impl.balance == 1).all()
    assert error["on"] < error["off"]


def test_a_balance_file_is_not_of_the_draft_model(tmp_path):
    """Its layers may have other shapes, and any numbers would be those of the target's layers."""
    file = tmp_path / "balance.safetensors"
    save_file({"layers.0": torch.full((2, 64), 3.0)}, file)
    settings = Settings(PRESETS["k4v2_g128"], str(file))
    scale = balance.layer_scale(settings, "draft_model.model.layers.0.self_attn.attn", 4, 128, torch.device("cpu"))
    assert scale.equal(torch.ones(4, 128))


def test_a_balance_file_of_another_model_is_refused(llama, tmp_path):
    file = tmp_path / "balance.safetensors"
    save_file({"layers.0": torch.ones(8, 64)}, file)
    for words, path in (("cannot be read", tmp_path / "missing"), ("no scale layers.0 of 2 KV heads", file)):
        with pytest.raises(SpecError, match=words):
            configure(llama, attention_backend="CUSTOM", additional_config={"kvarn": {"balance": str(path)}})
