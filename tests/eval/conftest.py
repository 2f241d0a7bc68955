import pytest
import torch


@pytest.fixture(scope="session")
def model():
    """A random two-layer model with grouped heads, attention handed to the harness."""
    transformers = pytest.importorskip("transformers")
    from kvarn_compile.eval.hf import adopt

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, head_dim=32, attention_bias=True)
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=2.0)
        torch.nn.init.normal_(layer.self_attn.q_proj.weight, std=0.2)
        torch.nn.init.normal_(layer.self_attn.k_proj.weight, std=0.2)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return adopt(model)


@pytest.fixture
def ids():
    """Two windows of three tiles."""
    return torch.randint(0, 97, (2, 384), generator=torch.Generator().manual_seed(1))
