import pytest
import torch

from kvarn_compile import hf_models, perplexity


@pytest.fixture
def loaded(tiny):
    return hf_models.open_model(str(tiny))


def test_chunks_through_a_cache_equal_one_pass(loaded):
    ids = perplexity.page_ids(loaded.tokenizer, 3)
    assert ids.shape == (1, 3 * perplexity.CHUNK + 1)
    steps = []
    step = hf_models.stepper(loaded.model, hf_models.static_cache(loaded.model, 512))
    score = perplexity.score(step, ids, steps.append)
    with torch.no_grad():
        logits = loaded.model(ids[:, :-1]).logits[0].double()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item()
    assert score.perplexity == pytest.approx(expected, rel=1e-5)
    assert torch.equal(score.choices, logits.argmax(-1)) and steps == [1, 1, 1]


def test_agreement():
    a, b = perplexity.Score(1.0, torch.tensor([1, 2, 3, 4])), perplexity.Score(1.0, torch.tensor([1, 2, 3, 5]))
    assert a.agreement(a) == 1 and a.agreement(b) == 0.75


def test_page_is_long_enough_and_a_short_one_is_refused(loaded, monkeypatch):
    assert len(perplexity.page_text().split()) > 1500
    monkeypatch.setattr(perplexity, "page_text", lambda: "too short")
    with pytest.raises(ValueError, match="9 tokens"):
        perplexity.page_ids(loaded.tokenizer, 4)
