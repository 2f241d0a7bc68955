import pytest

from kvarn.errors import SpecError
from kvarn_compile.eval import calibrate, compiled, harness, hf
from kvarn_compile.eval.methods import make
from kvarn_compile.eval.methods.base import Facts


@pytest.mark.parametrize("name", ["k4v2_g128", "k4v4_g128", "k16v16"])
def test_the_compiled_model_gives_the_harness_numbers(model, ids, name):
    facts = Facts(hf.model_shape(model), calibrate.from_random(model, "cpu"))
    method = make(name, facts)
    own = harness.evaluate(model, {"text": ids}, [method])["text"][name]
    product = compiled.evaluate(model, {"text": ids}, [method])["text"][name]
    assert product["kl"] == pytest.approx(own["kl"], rel=0.02, abs=1e-6)
    assert product["ppl"] == pytest.approx(own["ppl"], rel=1e-3)
    assert (own["kl"] == 0) == (name == "k16v16")


def test_a_peer_has_no_compiled_form(model, ids):
    facts = Facts(hf.model_shape(model))
    with pytest.raises(SpecError, match="compiled"):
        compiled.evaluate(model, {"text": ids}, [make("kivi_k4v2", facts)])
