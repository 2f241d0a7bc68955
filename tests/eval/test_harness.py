import copy

import pytest
import torch

from kvarn import PackedCache
from kvarn.errors import ShapeError, SpecError
from kvarn.spec import QuantSpec
from kvarn_compile.eval import calibrate, greedy, harness, hf
from kvarn_compile.eval.methods import PEERS, make
from kvarn_compile.eval.methods.base import Facts
from kvarn_compile.eval.session import Recorder, Session


@pytest.fixture
def facts(model):
    return Facts(hf.model_shape(model), calibrate.from_random(model, "cpu"))


def evaluate(model, ids, facts, *names, **options):
    return harness.evaluate(model, {"text": ids}, [make(name, facts) for name in names], **options)["text"]


def test_the_attention_of_the_harness_is_the_models_own(model, ids):
    transformers = pytest.importorskip("transformers")
    plain = transformers.LlamaForCausalLM(copy.deepcopy(model.config))
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(hf.run_chunk(model, ids, 0, Recorder()), plain.eval()(ids).logits)


def test_chunks_of_exact_tiles_are_one_plain_run(model, ids, facts):
    found = evaluate(model, ids, facts, "unquantized", "k16v16")
    with torch.no_grad():
        logits = hf.run_chunk(model, ids, 0, Recorder())
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for result in found.values():
        assert result["kl"] == 0 and result["top1"] == 1
        assert result["ppl"] == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.parametrize("name", ["k4v2_g128", "k4v4_g64", "upstream_k4v2_g128"])
def test_a_session_reads_what_a_packed_cache_holds(facts, name):
    method = make(name, facts)
    generator = torch.Generator().manual_seed(2)
    k, v, q = (torch.randn(2, h, 384, 32, generator=generator) for h in (2, 2, 4))
    session = Session(method, 384)
    store = PackedCache.empty(method.layout.spec, 2, 2, 512, 32, torch.float32,
                              balance=method.balance(1, 2, k))
    for start in range(0, 384, 128):
        part = slice(start, start + 128)
        session.attend(1, q[:, :, part], k[:, :, part], v[:, :, part], 1.0, None)
        session.advance(128)
    for start in range(0, 384, group := method.layout.spec.group):  # tile by tile: every tile passes through the tail
        part = slice(start, start + group)
        store.append(k[:, :, part], v[:, :, part], torch.arange(start, start + group))
    closed = 384 - group  # the store's last tile is still open, the session's is not
    for mine, theirs in zip(session._past[1], store.unpack(), strict=True):
        torch.testing.assert_close(mine[:, :, :closed], theirs[:, :, :closed])


def test_more_bits_are_closer(model, ids, facts):
    names = ("k2v2_g128", "k4v2_g128", "k4v4_g128", "k8v8_g128", "unquantized")
    found = evaluate(model, ids, facts, *names)
    kl = [found[name]["kl"] for name in names]
    assert kl == sorted(kl, reverse=True) and kl[-2] > 0 == kl[-1]


def test_unbalanced_leaves_the_key_scales_out(model, ids, facts):
    found = evaluate(model, ids, facts, "k4v2_g128", "k4v2_g128+unbalanced", sides="k")
    without = evaluate(model, ids, Facts(facts.shape), "k4v2_g128", sides="k")
    assert found["k4v2_g128+unbalanced"]["kl"] == without["k4v2_g128"]["kl"] != found["k4v2_g128"]["kl"]


def test_sides_and_layers_restrict_a_method(model, ids, facts):
    def layers(**options):
        return evaluate(model, ids, facts, "k4v2_g128", probe=True, **options)["k4v2_g128"]["layers"]

    keys = layers(sides="k")
    assert min(keys["k"]) > 0 and max(keys["v"]) == 0 and min(keys["out"]) > 0
    values = layers(sides="v")
    assert max(values["k"]) == 0 and min(values["v"]) > 0
    one = layers(only=frozenset({1}))
    assert one["k"][0] == 0 and one["k"][1] > 0 and one["out"][0] == 0


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_runs_and_states_its_bits(model, ids, facts, name):
    found = evaluate(model, ids[:, :256], facts, name)[name]
    assert 0 <= found["kl"] < 5 and 2 < found["bits"] < 20
    assert (found["kl"] == 0) == (name == "unquantized" or name.endswith("_skip"))  # two layers: both are skipped


def test_bits_count_everything(facts):
    method = make("k4v2_g128", facts)
    records, tail = method.layout.record_bytes, method.layout.tail_bytes
    assert method.bits(1024) == (8 * records + tail) * 8 / (2 * 32 * 1024)
    assert make("upstream_k4v2_g128", facts).bits(1024) > make("upstream_k4v2_g128+nosink", facts).bits(1024)


def test_a_window_of_another_length_is_refused(model, ids, facts):
    with pytest.raises(ShapeError, match="multiples of 128"):
        evaluate(model, ids[:, :200], facts, "k4v2_g128")


@pytest.mark.parametrize("name", ["k5v2", "k4v2_g128+fast", "kvarn1:k4v2g128e1t8s0"])
def test_an_unknown_method_is_refused(facts, name):
    with pytest.raises(SpecError, match="valid"):
        make(name, facts)


def test_a_name_of_bits_is_a_spec(facts):
    assert make("k3v2_g128", facts).layout.spec == QuantSpec(3, 2, 128)
    upstream = make("upstream_k4v4_g64", facts).layout.spec
    assert (upstream.method, upstream.v_bits, upstream.group, upstream.sink) == ("upstream", 4, 64, True)


def test_greedy_divergence(model, ids, facts):
    prompt = ids[:, :128]
    expected = greedy.continuation(model, prompt, 128, facts)
    with torch.no_grad():
        again = hf.run_chunk(model, torch.cat([prompt, expected], 1), 0, Recorder()).argmax(-1)[:, 127:-1]
    assert torch.equal(expected, again)
    found = greedy.divergence(model, prompt, expected, [make(n, facts) for n in ("unquantized", "turboquant_3bit_nc")])
    assert found["unquantized"] == [128, 128]
    assert min(found["turboquant_3bit_nc"]) < 128
