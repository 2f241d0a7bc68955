"""On a GPU: the lossless preset against stock vLLM's FlashAttention, with and without CUDA graphs.

Additions happen in another order than FlashAttention's, so bfloat16 logits differ in their last bits: log probabilities
are compared to a tolerance, step by step, and a text may leave the other only where two tokens are that close.
"""

import logging

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
import small_models
from serving import free_blocks, greedy, layers, prompts, scheduler

NOISE = 0.15
"""Difference of two log probabilities that bfloat16 explains."""
BASE = {"dtype": "bfloat16", "gpu_memory_utilization": 0.3}
OURS = BASE | {"kv_cache_dtype": "kvarn_k16v16"}
LENGTHS = (1, 2, 126, 127, 128, 129, 255, 256, 257, 300)
GRAPHS = {"both": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
          "decodes": {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_models.write(tmp_path_factory.mktemp("gpu"), heads=8, kv_heads=2, head_dim=128, attention=0.5)


@pytest.fixture(scope="module")
def stock(engines, model):
    return engines(model, **BASE)


@pytest.fixture(scope="module")
def eager(engines, model):
    return engines(model, **OURS)


def far(ours, theirs, texts, count, noise=NOISE):
    """Steps at which two engines are further apart than `noise`, and how many steps were compared at all."""
    wrong, compared = [], 0
    for a, b in zip(*(greedy(llm, texts, count, logprobs=8, full=True) for llm in (ours, theirs)), strict=True):
        steps = zip(a.outputs[0].logprobs, b.outputs[0].logprobs, a.outputs[0].token_ids, b.outputs[0].token_ids,
                    strict=True)
        for at, (mine, reference, token, expected) in enumerate(steps):
            both = mine.keys() & reference.keys()
            gap = max((abs(mine[t].logprob - reference[t].logprob) for t in both), default=noise)
            if token != expected and token in reference:
                gap = max(gap, reference[expected].logprob - reference[token].logprob)
            if gap > noise or expected not in mine or token not in reference:
                wrong.append((len(a.prompt_token_ids), at, gap))
            compared += 1
            if token != expected:
                break
    return wrong, compared


def check(ours, theirs, texts, count):
    wrong, compared = far(ours, theirs, texts, count)
    assert not wrong
    assert compared > len(texts) * min(count, 30) / 3  # a near tie ends a text's comparison; long texts meet one


def test_who_attends(stock, eager):
    assert {layer.attn_backend.get_name() for layer in layers(stock)} == {"FLASH_ATTN"}
    assert {layer.attn_backend.get_name() for layer in layers(eager)} == {"CUSTOM"}
    assert all(layer.impl.flash is not None for layer in layers(eager))


def test_eager(eager, stock):
    check(eager, stock, prompts(*LENGTHS), 20)


@pytest.mark.parametrize("mode", GRAPHS)
def test_cuda_graphs(engines, model, stock, mode):
    llm = engines(model, **OURS, **GRAPHS[mode])
    check(llm, stock, prompts(*LENGTHS), 20)
    check(llm, stock, prompts(100, 120, seed=1), 150)
    check(llm, stock, prompts(*(7 + 41 * i % 290 for i in range(32)), seed=3), 10)


def test_rope_fused_with_the_write(engines, model, stock, caplog):
    """Compiled by vLLM, in pieces; decodes in CUDA graphs."""
    caplog.set_level(logging.INFO, "vllm.kvarn")
    llm = engines(model, **OURS, enforce_eager=False, compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY"},
                  additional_config={"kvarn": {"fuse_rope": True}})
    assert any("RoPE and the cache write are one op" in record.getMessage() for record in caplog.records)
    check(llm, stock, prompts(*LENGTHS), 20)
    check(llm, stock, prompts(100, 120, seed=1), 150)


def test_chunks_prefix_hits_and_preemption(engines, model, stock, monkeypatch):
    llm = engines(model, **OURS, **GRAPHS["decodes"], max_num_batched_tokens=96, num_gpu_blocks_override=13,
                  max_num_seqs=6)
    check(llm, stock, prompts(300, 256, 50, 129, seed=6), 10)
    again = prompts(300, 256, seed=6)
    assert [output.num_cached_tokens for output in greedy(llm, again[:1], 2, full=True)] == [256]
    core, preempted = scheduler(llm), []
    original = core._preempt_request
    monkeypatch.setattr(core, "_preempt_request", lambda request, *a, **k: (preempted.append(request.request_id),
                                                                          original(request, *a, **k))[1])
    before = free_blocks(llm)
    check(llm, stock, prompts(120, 110, 126, 100, 128, 90, seed=8), 60)
    assert preempted
    assert free_blocks(llm) == before


def test_the_v1_model_runner(engines, model, stock, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    llm = engines(model, **OURS, **GRAPHS["decodes"], max_model_len=448)
    check(llm, stock, prompts(*LENGTHS, seed=14), 20)


def test_ngram_speculation(engines, model, stock):
    ngram = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    llm = engines(model, **OURS, **GRAPHS["decodes"], speculative_config=ngram)
    texts = [{"prompt_token_ids": text["prompt_token_ids"] * 3} for text in prompts(40, 42, 20, 41, seed=1)]
    check(llm, stock, texts, 60)


def test_a_draft_model(engines, model, stock):
    """The target drafts for itself: with it right, nearly every draft is accepted, at tile edges too."""
    llm = engines(model, **OURS, **GRAPHS["decodes"], speculative_config={
        "method": "draft_model", "model": str(model), "num_speculative_tokens": 3})
    check(llm, stock, prompts(*LENGTHS, seed=15), 40)


def test_windows(engines, tmp_path_factory):
    gemma = small_models.write(tmp_path_factory.mktemp("gemma"), "gemma3", heads=4, kv_heads=2, head_dim=128, layers=3,
                               sliding_window=64, layer_types=["sliding_attention", "sliding_attention",
                                                               "full_attention"])
    check(engines(gemma, **OURS), engines(gemma, **BASE), prompts(1, 63, 64, 65, 127, 128, 129, 300, seed=30), 40)


@pytest.mark.parametrize("preset", ["k4v2_g128", "k8v8_g128"])
def test_packed_tiles_with_and_without_graphs(engines, model, preset):
    """The same kernels, with other numbers of parts."""
    plain, graphs = (engines(model, **BASE, **more, kv_cache_dtype=f"kvarn_{preset}", max_num_batched_tokens=128)
                     for more in ({}, GRAPHS["decodes"]))
    check(graphs, plain, prompts(*LENGTHS, seed=21), 20)


def test_a_wrong_tile_is_seen(eager, stock):
    """The negative control: overwritten records are further away than noise."""
    text = prompts(280, seed=11)
    greedy(eager, text, 1)
    for layer in layers(eager):
        layer.kv_cache[1:] = 0
    wrong, _ = far(eager, stock, text, 8)
    assert wrong
    eager.reset_prefix_cache()
