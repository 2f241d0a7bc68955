"""Real transformers models with a StaticCache, tiny and random."""

import pytest
import torch
from compare import TOLERANCE, RewritingBackend

from kvarn.spec import PRESETS

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 512}
MODELS = {
    "llama": lambda attn: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, attn_implementation=attn)),
    "qwen2": lambda attn: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, attn_implementation=attn)),
    "gemma3": lambda attn: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, head_dim=64, sliding_window=64, attn_implementation=attn,
                                      layer_types=["sliding_attention", "full_attention"])),
}


def logits(model, config, chunks=(5, 1, 1)):
    """Logits of chunks of random tokens through one StaticCache."""
    torch.manual_seed(1)
    cache = transformers.StaticCache(config=config, max_cache_len=200)
    cache.early_initialization(batch_size=1, num_heads=2, head_dim=64, dtype=torch.float32, device="cpu")
    outputs, start = [], 0
    for n in chunks:
        positions = torch.arange(start, start + n)[None]
        outputs.append(model(torch.randint(0, 97, (1, n)), past_key_values=cache, position_ids=positions).logits)
        start += n
    return outputs


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_static_cache(name, attn):
    model = MODELS[name](attn).eval()
    backend = RewritingBackend()
    want = logits(model, model.config)
    got = logits(torch.compile(model, backend=backend), model.config)
    assert backend.decisions and all(decision.accepted for decision in backend.decisions)
    assert {d.kind for d in backend.decisions} == {"sdpa" if attn == "sdpa" else "softmax"}
    assert {d.module_path for d in backend.decisions} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE[torch.float32], rtol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_qwen2_key_bias_is_found():
    model = MODELS["qwen2"]("sdpa").eval()
    backend = RewritingBackend(PRESETS["k4v2_g128"])
    logits(torch.compile(model, backend=backend), model.config, chunks=(5,))
    sources = [pair.balance for pair in backend.results[0].pairs]
    assert all(s and None not in (s.weight, s.bias, s.inv_freq, s.norm) for s in sources)
