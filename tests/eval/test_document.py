from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks/accuracy"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def summary(kl, ppl=10.0, bits=4.0):
    return {"kl": kl, "kl_p99": kl, "top1": 0.9, "ppl": ppl, "bits": bits, "kl_windows": [kl], "kl_bins": [kl] * 4,
            "positions": 16384}


def results(model="smollm2-135m", ours=0.5, wide=0.1, peer=2.0, peer_ppl=11.0, peer_bits=3.0, wide_ppl=10.01):
    found = {"unquantized": summary(0.0), "k4v2_g128": summary(ours, 10.1),
             "upstream_k4v2_g128": summary(1.0, 10.2, 5.0), "k4v4_g128": summary(wide, wide_ppl),
             "upstream_k4v4_g128": summary(0.2, 10.0, 6.0), "peer": summary(peer, peer_ppl, peer_bits)}
    return {(model, 4096): {"model": model, "context": 4096, "settings": {}, "results": {"wiki": found}}}


def test_the_verdict_counts_what_is_met():
    import verdict

    text = verdict.answer(results())
    assert "within a factor of 4.0 of its KL" in text and "none has a lower perplexity" in text
    assert "All are met." in text and "on every model." in text and "at most 0.10% (goal: 0.2%)" in text
    assert "qwen2.5-coder-1.5b was not measured." in text


@pytest.mark.parametrize(("change", "said"), [
    ({"ours": 0.7}, "Missed: smollm2-135m (30.0% of 40%)"),
    ({"wide": 0.3}, "on every model but smollm2-135m."),
    ({"peer_ppl": 10.05}, "none but peer on smollm2-135m has a lower perplexity"),
    ({"wide_ppl": 10.05}, "above the goal: smollm2-135m (+0.50%)"),
])
def test_the_verdict_says_what_is_not(change, said):
    import verdict

    assert said in verdict.answer(results(**change)) and said not in verdict.answer(results())


def test_a_peer_of_more_bits_is_not_compared():
    import verdict

    row, = verdict.measured(results(peer_bits=4.5))
    assert not row.peers and list(next(verdict.measured(results())).peers) == ["peer"]


@pytest.mark.parametrize(("ppl", "same"), [(10.0, True), (10.0001, True), (10.1, False), (None, False)])
def test_results_merge_only_over_the_same_windows(ppl, same):
    import collect

    new = {"wiki": {} if ppl is None else {"unquantized": summary(0.0, ppl)}}
    assert collect.same_windows({"wiki": {"unquantized": summary(0.0)}}, new) is same


def test_other_encoders_start_from_the_products_bytes():
    import encoders
    import torch

    from kvarn import StoreLayout, closed
    from kvarn.spec import PRESETS

    layout = StoreLayout(PRESETS["k4v2_g128"], 64, torch.float32)
    k, v = torch.randn(2, 3, 128, 64), torch.randn(2, 3, 128, 64) + torch.randn(64)
    product = closed.encode(k, v, layout)
    assert torch.equal(encoders.encode(k, v, layout, encoders.Choice()), product)
    once = encoders.Choice(refit=False, steps=(1.0, 1.0))
    assert torch.equal(encoders.encode(k, v, layout, once), product)
    better = encoders.encode(k, v, layout, encoders.CHOICES["refit, steps"])
    errors = [(closed.decode(record, layout)[1] - v).square().sum() for record in (better, product)]
    assert errors[0] < errors[1]
