"""Speculative decoding: drafts are written, rejected ones taken back, over tile edges, without a trace."""

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
import small_models
from serving import greedy, prompts, scheduler

from kvarn_compile.vllm.metadata import TileMetadataBuilder

DRAFTS = 5


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """A model whose text repeats itself, so that a part of the drafts is accepted."""
    return small_models.write(tmp_path_factory.mktemp("repeating"), attention=0.03)


@pytest.fixture(scope="module")
def plain(engines, repeating):
    return engines(repeating)


@pytest.fixture(scope="module")
def speculating(engines, repeating, plain):
    """Made last: vLLM 0.32's CPU build cannot start another engine in a process that has compiled its ngram search."""
    ngram = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    return engines(repeating, kv_cache_dtype="kvarn_k16v16", speculative_config=ngram)


def count_drafts(llm, monkeypatch):
    """A function that says how many drafts there were since, and how many were accepted."""
    seen = []

    def spy(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs):
        seen.append((num_draft_tokens, num_accepted_tokens))

    monkeypatch.setattr(scheduler(llm), "make_spec_decoding_stats", spy)
    return lambda: [sum(x) for x in zip(*seen, strict=True)]


def longest_rows(monkeypatch):
    """For each part of a step from now on: the length of its longest row on the device, and by its metadata; and
    whether it is of prompts."""
    seen, original = [], TileMetadataBuilder.build

    def build(*args, **kwargs):
        step = original(*args, **kwargs)
        parts = [*step.prompts, *([step.decodes] if step.decodes else [])]
        seen.extend((int(rows.ends.max()), rows.max_end, rows in step.prompts) for rows in parts)
        return step

    monkeypatch.setattr(TileMetadataBuilder, "build", build)
    return seen


@pytest.mark.parametrize("shape", [{"layers": 2}, {"layers": 1},
                                   {"layers": 1, "heads": 2, "kv_heads": 1, "hidden": 64}])
def test_a_draft_model(engines, llama, stock, tmp_path_factory, monkeypatch, shape):
    """Its cache is packed as well: the target's own copy is always right, others, of other KV heads too, are wrong."""
    draft = small_models.write(tmp_path_factory.mktemp("draft"), **shape)
    ours = engines(llama, kv_cache_dtype="kvarn_k16v16", speculative_config={
        "method": "draft_model", "model": str(draft), "num_speculative_tokens": 3})
    drafts = count_drafts(ours, monkeypatch)
    texts = prompts(1, 100, 126, 127, 128, 129, 300, seed=3)
    lengths = longest_rows(monkeypatch)
    assert greedy(ours, texts, 60) == greedy(stock, texts, 60)
    assert {prompt for _, _, prompt in lengths} == {False, True}
    assert all(actual <= planned for actual, planned, _ in lengths)
    drafted, accepted = drafts()
    assert drafted > 300
    assert accepted == drafted if shape["layers"] == 2 else accepted < 10


def test_tokens_are_those_without_speculation(plain, speculating, monkeypatch):
    drafts = count_drafts(speculating, monkeypatch)
    texts = [{"prompt_token_ids": text["prompt_token_ids"] * 3} for text in prompts(40, 42, 20, 41, seed=1)]
    assert greedy(speculating, texts, 150) == greedy(plain, texts, 150)
    drafted, accepted = drafts()
    assert accepted > 10
    assert drafted - accepted > 200


def test_up_to_max_model_len(plain, speculating):
    texts = [{"prompt_token_ids": text["prompt_token_ids"] * 12} for text in prompts(40, 41, seed=4)]
    expected = greedy(plain, texts, 600)
    assert [len(tokens) for tokens in expected] == [32, 20]
    assert greedy(speculating, texts, 600) == expected


def test_prefixes_filled_by_drafts_are_right(plain, speculating):
    text = [{"prompt_token_ids": prompts(30, seed=2)[0]["prompt_token_ids"] * 4}]
    longer = [{"prompt_token_ids": text[0]["prompt_token_ids"] + greedy(speculating, text, 160)[0]}]
    hit = greedy(speculating, longer, 20, full=True)[0]
    assert hit.num_cached_tokens == 256
    assert list(hit.outputs[0].token_ids) == greedy(plain, longer, 20)[0]
