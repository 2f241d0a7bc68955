"""Whole rewrites of toy models: op gone, op present, exact count, equal numbers."""

import pytest
import torch
from compare import LOSSLESS, TOLERANCE, RewritingBackend, run_both
from steps import CHUNKS, in_chunks
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion
from toy_models import (
    Config,
    GptFast,
    HFModel,
    Llama,
    eager_attention,
    repeat_sdpa_attention,
    sdpa_attention,
)

from kvarn.spec import PRESETS

KVARN, ATEN = torch.ops.kvarn, torch.ops.aten
STYLES = {
    "hf_sdpa": (lambda c: HFModel(c, sdpa_attention), "hf"),
    "hf_repeat": (lambda c: HFModel(c, repeat_sdpa_attention), "hf"),
    "hf_eager": (lambda c: HFModel(c, eager_attention), "hf"),
    "gpt": (GptFast, "gpt"),
    "rows": (GptFast, "rows"),
    "llama": (Llama, "llama"),
}


def check_rewritten(backend: RewritingBackend, layers: int):
    """Every attention is a store's, no cache write is left, and the counters say so."""
    graphs = len(backend.graphs)
    assert graphs and all(decision.accepted for decision in backend.decisions)
    assert backend.ops(KVARN.append.default) == backend.ops(KVARN.attend.default) == graphs * layers
    for gone in (KVARN.sdpa.default, ATEN.scaled_dot_product_attention.default, ATEN.index_copy.default,
                 ATEN.index_put.default, ATEN.slice_scatter.default, ATEN._softmax.default):
        assert backend.ops(gone) == 0, gone
    assert counters["kvarn"] == {"attention_found": graphs * layers, "attention_rewritten": graphs * layers,
                                 "attention_refused": 0}


@pytest.mark.parametrize("style, heads, kv_heads, batch", [
    ("hf_sdpa", 4, 1, 1), ("hf_sdpa", 2, 2, 2), ("hf_repeat", 4, 2, 1), ("hf_eager", 7, 1, 3), ("gpt", 4, 2, 3),
    ("rows", 4, 2, 2), ("rows", 2, 1, 1), ("llama", 7, 1, 1), ("llama", 4, 2, 3)])
def test_lossless_store_equals_plain_cache(style, heads, kv_heads, batch):
    make, calls = STYLES[style]
    config = Config(heads=heads, kv_heads=kv_heads, batch=batch)
    backend = RewritingBackend()
    difference = run_both(make(config), in_chunks(calls, batch=batch), backend)
    check_rewritten(backend, config.layers)
    assert difference < TOLERANCE[config.dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("style", ["hf_sdpa", "hf_eager", "llama"])
def test_half_precision(style, dtype):
    make, calls = STYLES[style]
    config = Config(dtype=dtype)
    backend = RewritingBackend()
    difference = run_both(make(config).to(dtype), in_chunks(calls, chunks=(5, 1, 1)), backend)
    check_rewritten(backend, config.layers)
    assert difference < TOLERANCE[dtype]


@pytest.mark.parametrize("style", ["hf_repeat", "gpt", "llama"])
def test_dynamic_shapes_burn_nothing_in(style):
    if style == "hf_repeat" and TorchVersion(torch.__version__) < "2.13":
        pytest.skip("dynamic=True made the number of KV heads a symbol, which no store has")
    make, calls = STYLES[style]
    config = Config()
    backend = RewritingBackend()
    chunks = (5, 9, 17, 1, 1)
    difference = run_both(make(config), in_chunks(calls, chunks), backend, dynamic=True)
    check_rewritten(backend, config.layers)
    assert difference < TOLERANCE[config.dtype]
    assert len(backend.graphs) < len(chunks)  # one graph serves several lengths


def test_llama_batch_slice_writes_the_first_rows():
    config = Config(batch=3)
    backend = RewritingBackend()
    assert run_both(Llama(config), in_chunks("llama", batch=2), backend) < TOLERANCE[config.dtype]
    check_rewritten(backend, config.layers)
    lengths = [store[2].tolist() for store in backend.stores.values()]
    assert lengths == [[sum(CHUNKS), sum(CHUNKS), 0]] * config.layers


def test_returned_cache_becomes_none():
    """Llama assigns its caches anew, so its graph returns them; AOTAutograd hands out the inputs in their place."""
    config = Config()
    backend = RewritingBackend()
    run_both(Llama(config), in_chunks("llama", (5,)), backend)
    _, *caches = backend.graphs[0].graph.find_nodes(op="output")[0].args[0]
    assert caches == [None] * 2 * config.layers


def test_one_token_prompt_of_one_head():
    """Sizes of 1 on batch, heads and tokens at once leave the axes to be told apart by the write."""
    config = Config(heads=2, kv_heads=1)
    backend = RewritingBackend()
    assert run_both(Llama(config), in_chunks("llama", (1, 1, 1, 5)), backend) < TOLERANCE[config.dtype]
    check_rewritten(backend, config.layers)
    assert {pair.axes.order for result in backend.results for pair in result.pairs} == {(0, 2, 1, 3)}


def test_prompt_that_fills_the_cache():
    """A slice write of everything has no slice left in the graph."""
    config = Config(capacity=40)
    backend = RewritingBackend()
    assert run_both(Llama(config), in_chunks("llama", (40,)), backend) < TOLERANCE[config.dtype]
    assert backend.ops(KVARN.attend.default) == config.layers


def test_shared_cache_is_one_store():
    config = Config(layers=3)
    backend = RewritingBackend()
    assert run_both(HFModel(config, share=True), in_chunks("hf"), backend) < TOLERANCE[config.dtype]
    for gm, result in zip(backend.graphs, backend.results, strict=True):
        assert len(result.pairs) == 1 and [d.pair for d in result.decisions] == [0, 0, 0]
        assert len(gm.graph.find_nodes(op="call_function", target=KVARN.append.default)) == 1
        assert len(gm.graph.find_nodes(op="call_function", target=KVARN.attend.default)) == 3


def test_quantized_store_stays_close():
    config = Config(capacity=320)
    backend = RewritingBackend(PRESETS["k8v8_g128"])
    difference = run_both(HFModel(config), in_chunks("hf", (300, 1, 1)), backend)
    check_rewritten(backend, config.layers)
    assert 0 < difference < 0.05


def test_calling_convention():
    """Kept placeholders in order, then records, tail, lengths and balance of each pair, with their real shapes."""
    config = Config(layers=2)
    backend = RewritingBackend()
    run_both(HFModel(config), in_chunks("hf", (5,)), backend)
    gm, result = backend.graphs[0], backend.results[0]
    inputs = gm.graph.find_nodes(op="placeholder")
    caches = {i for pair in result.pairs for i in (pair.key_input, pair.value_input)}
    assert not caches & set(result.kept) and list(result.kept) == sorted(result.kept)
    assert len(caches) == 4 and len(inputs) == len(result.kept) + 4 * len(result.pairs)
    for number, store in enumerate(backend.stores.values()):
        group = inputs[len(result.kept) + 4 * number :][:4]
        assert [tuple(node.meta["val"].shape) for node in group] == [tuple(tensor.shape) for tensor in store]
        assert [node.meta["val"].dtype for node in group] == [tensor.dtype for tensor in store]
        assert all(node.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"} for node in group)
    assert [pair.module_path for pair in result.pairs] == ["layers.0", "layers.1"]
    decision = result.decisions[0]
    assert decision.shape == (1, 2, 320, 64) and "toy_models.py" in decision.source and decision.kind == "sdpa"


def test_without_attention_nothing_changes():
    backend = RewritingBackend()
    model = torch.nn.Linear(8, 8)
    x = torch.ones(2, 8)
    assert run_both(model, lambda f: [f(x)], backend) == 0
    assert backend.results[0].decisions == () and backend.results[0].kept == (0, 1, 2)
    assert counters["kvarn"]["attention_found"] == 0


def test_lossless_store_has_no_balance_source():
    backend = RewritingBackend(LOSSLESS)
    run_both(HFModel(Config(bias=True)), in_chunks("hf", (5,)), backend)
    assert [pair.balance for pair in backend.results[0].pairs] == [None, None]
