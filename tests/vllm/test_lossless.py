"""With preset k16v16 the plugin gives stock vLLM's tokens: every schedule that moves the open tile about."""

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
import small_models
from serving import free_blocks, greedy, prompts, scheduler

EDGES = (1, 2, 126, 127, 128, 129, 254, 255, 256, 257, 300)


def test_tokens_are_stock_vllms_at_tile_edges(stock, lossless):
    texts = prompts(*EDGES)
    expected = greedy(stock, texts, 12)
    assert len({token for tokens in expected for token in tokens}) > 50  # the model does not repeat itself
    assert greedy(lossless, texts, 12) == expected


def test_a_decode_across_a_whole_tile(stock, lossless):
    texts = prompts(100, 120, seed=1)
    assert greedy(lossless, texts, 150) == greedy(stock, texts, 150)


def test_logprobs_are_stock_vllms(stock, lossless):
    texts = prompts(130, 5, seed=2)
    for ours, theirs in zip(*(greedy(llm, texts, 4, logprobs=5, full=True) for llm in (lossless, stock)), strict=True):
        for step, reference in zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            assert step.keys() == reference.keys()
            assert all(abs(step[t].logprob - reference[t].logprob) < 1e-3 for t in step)


def test_a_ragged_batch_of_32(stock, lossless):
    texts = prompts(*(7 + 41 * i % 290 for i in range(32)), seed=3)
    assert greedy(lossless, texts, 10) == greedy(stock, texts, 10)


@pytest.mark.parametrize("length, cached", [(128, 0), (129, 128), (200, 128), (257, 256)])
def test_prefix_hits_are_whole_tiles(stock, lossless, length, cached):
    text = prompts(length, seed=100 + length)
    greedy(lossless, text, 2)
    again = greedy(lossless, text, 12, full=True)[0]
    assert again.num_cached_tokens == cached
    assert list(again.outputs[0].token_ids) == greedy(stock, text, 12)[0]


def test_a_prefix_shared_within_one_step(stock, lossless):
    shared = prompts(200, seed=4)[0]["prompt_token_ids"]
    texts = [{"prompt_token_ids": shared + [10 + i] * (1 + 30 * i)} for i in range(4)]
    assert greedy(lossless, texts, 8) == greedy(stock, texts, 8)


def test_the_tiles_a_decode_filled_are_hit(stock, lossless):
    text = prompts(120, seed=5)[0]["prompt_token_ids"]
    longer = [{"prompt_token_ids": text + greedy(lossless, [{"prompt_token_ids": text}], 20)[0]}]
    hit = greedy(lossless, longer, 8, full=True)[0]
    assert hit.num_cached_tokens == 128
    assert list(hit.outputs[0].token_ids) == greedy(stock, longer, 8)[0]


def test_chunked_prefill(engines, llama, stock):
    chunked = engines(llama, kv_cache_dtype="kvarn_k16v16", max_num_batched_tokens=96)
    texts = prompts(300, 256, 50, 129, seed=6)
    assert greedy(chunked, texts, 10) == greedy(stock, texts, 10)


def test_up_to_max_model_len(stock, lossless):
    texts = prompts(505, 480, seed=7)
    expected = greedy(stock, texts, 600)
    assert [len(tokens) for tokens in expected] == [7, 32]
    assert greedy(lossless, texts, 600) == expected


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (7, 1), (2, 1)])
def test_a_qwen2_with_biases_and_other_groups(engines, tmp_path_factory, heads, kv_heads):
    folder = small_models.write(tmp_path_factory.mktemp("qwen"), "qwen2", heads, kv_heads, hidden=64 * heads)
    texts = prompts(127, 128, 260, seed=12)
    assert greedy(engines(folder, kv_cache_dtype="kvarn_k16v16"), texts, 8) == greedy(engines(folder), texts, 8)


@pytest.mark.parametrize("head_dim", [80, 128, 256])
def test_head_sizes(engines, tmp_path_factory, head_dim):
    folder = small_models.write(tmp_path_factory.mktemp("heads"), head_dim=head_dim)
    texts = prompts(127, 128, 260, seed=13)
    assert greedy(engines(folder, kv_cache_dtype="kvarn_k16v16"), texts, 8) == greedy(engines(folder), texts, 8)


@pytest.fixture(scope="module")
def tiny_pool(engines, llama):
    return engines(llama, kv_cache_dtype="kvarn_k16v16", num_gpu_blocks_override=9, max_num_seqs=6)


def test_preemption(tiny_pool, stock, monkeypatch):
    core, preempted = scheduler(tiny_pool), []
    original = core._preempt_request
    monkeypatch.setattr(core, "_preempt_request", lambda request, *a, **k: (preempted.append(request.request_id),
                                                                          original(request, *a, **k))[1])
    texts = prompts(120, 110, 126, 100, 128, 90, seed=8)
    assert greedy(tiny_pool, texts, 60) == greedy(stock, texts, 60)
    assert len(preempted) >= 2


def test_aborts_give_every_block_back(tiny_pool, stock):
    from vllm import SamplingParams

    before, llm = free_blocks(tiny_pool), tiny_pool.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    for i, text in enumerate(prompts(126, 130, 20, seed=9)):
        llm.add_request(f"aborted-{i}", text, sampling)
    for _ in range(5):
        llm.step()
    assert free_blocks(tiny_pool) < before
    llm.abort_request([request.request_id for request in list(scheduler(tiny_pool).running)], internal=True)
    while llm.has_unfinished_requests():
        llm.step()
    assert free_blocks(tiny_pool) == before
    text = prompts(200, seed=10)
    assert greedy(tiny_pool, text, 8) == greedy(stock, text, 8)


def test_a_wrong_tile_is_seen(lossless, stock):
    """The negative control: one record overwritten behind the engine's back changes the text."""
    text = prompts(280, seed=11)
    greedy(lossless, text, 1)
    layers = lossless.llm_engine.vllm_config.compilation_config.static_forward_context
    for layer in layers.values():
        layer.kv_cache[1:] = 0
    changed = greedy(lossless, text, 8, full=True)[0]
    assert changed.num_cached_tokens == 256
    assert list(changed.outputs[0].token_ids) != greedy(stock, text, 8)[0]
    lossless.reset_prefix_cache()
