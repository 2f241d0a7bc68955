"""Models that mix sliding windows and full attention: windows stay in vLLM's format, full layers are packed."""

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
import small_models
from serving import greedy, prompts


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return small_models.write(tmp_path_factory.mktemp("gemma"), "gemma3", layers=3, sliding_window=64, layer_types=[
        "sliding_attention", "sliding_attention", "full_attention"])


def backends(llm):
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return [layer.attn_backend.get_name() for layer in layers]


def test_lossless_tokens_are_stock_vllms(engines, gemma):
    stock, ours = engines(gemma), engines(gemma, kv_cache_dtype="kvarn_k16v16")
    assert backends(ours) == ["CPU_ATTN", "CPU_ATTN", "CUSTOM"]
    texts = prompts(1, 63, 64, 65, 127, 128, 129, 200, 300, seed=30)
    expected = greedy(stock, texts, 70)
    assert greedy(ours, texts, 70) == expected
    again = greedy(ours, texts[-2:], 70, full=True)
    assert again[1].num_cached_tokens == 256
    assert [list(output.outputs[0].token_ids) for output in again] == expected[-2:]


def test_a_padded_pool_serves(engines, gemma):
    """Tiles of 14,272 bytes in blocks of 32 plain tokens."""
    texts = prompts(129, 300, seed=31)
    ours = engines(gemma, dtype="bfloat16", kv_cache_dtype="kvarn_k4v2_g128")
    assert all(len(tokens) == 20 for tokens in greedy(ours, texts, 20))
