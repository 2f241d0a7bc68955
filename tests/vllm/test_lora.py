"""An adapter on the projections whose keys and values are packed."""

import json

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
import torch
from safetensors.torch import save_file
from serving import greedy, prompts


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Rank 8 on every attention projection of small_models' llama, strong enough to change the text."""
    folder, generator = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(1)
    sizes = {"q_proj": (256, 128), "k_proj": (128, 128), "v_proj": (128, 128), "o_proj": (128, 256)}
    weights = {}
    for name, (out, into) in sizes.items():
        for layer in range(2):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            weights[at + "A.weight"] = torch.randn(8, into, generator=generator) * 0.3
            weights[at + "B.weight"] = torch.randn(out, 8, generator=generator) * 0.3
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "bias": "none",
        "target_modules": list(sizes)}))
    return folder


def test_tokens_with_an_adapter_are_stock_vllms(engines, llama, adapter):
    """And without it, in the same engines. (In one batch vLLM's CPU build gives it to requests that did not ask.)"""
    from vllm.lora.request import LoRARequest

    texts = prompts(5, 127, 128, 260, seed=60)
    stock, ours = (engines(llama, enable_lora=True, max_lora_rank=8, max_num_seqs=8, **options)
                   for options in ({}, {"kv_cache_dtype": "kvarn_k16v16"}))
    requests = LoRARequest("adapter", 1, str(adapter)), None
    found = [[greedy(llm, texts, 12, lora_request=request) for request in requests] for llm in (stock, ours)]
    assert found[0] == found[1]
    assert found[1][0] != found[1][1]
