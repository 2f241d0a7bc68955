"""The pass on graphs as vLLM's compiler makes them: what it fuses, what it leaves, and that the text stays stock's."""

import logging
import operator
from collections import Counter
from types import SimpleNamespace
from uuid import uuid4

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
import small_models
import torch
from serving import configure, greedy, layers, prompts
from torch._dynamo.backends.common import aot_autograd
from vllm import _custom_ops as ops
from vllm.utils.torch_utils import _encode_layer_name

from kvarn import SpecError
from kvarn.errors import KVarnError
from kvarn.paged_layout import paged_layout
from kvarn.spec import PRESETS
from kvarn_compile.vllm import fusion, impl, rope_store, warmup
from kvarn_compile.vllm.backend import KVarnApart
from kvarn_compile.vllm.graph_pass import ROPE, WRITE, InductorPass, Reason, RopeStorePass, decisions
from kvarn_compile.vllm.settings import Settings

Q, KV, D = 256, 128, 64
FUSE = {"additional_config": {"kvarn": {"fuse_rope": True}}}


def attend(q, k, v, name="layer", write=True):
    """What vLLM's Attention.forward traces to."""
    q, k, v = q.view(-1, 4, D), k.view(-1, 2, D), v.view(-1, 2, D)
    out, name = torch.empty(len(q), Q).view(-1, 4, D), _encode_layer_name(name)
    written = torch.ops.vllm.unified_kv_cache_update(k, v, name) if write else None
    torch.ops.vllm.unified_attention_with_output(q, k, v, out, name, kv_cache_dummy_dep=written)
    return out.view(-1, Q)


def projected(qkv, positions, angles):
    """A Llama's layer: q, k, v are slices of one projection."""
    q, k, v = qkv.split([Q, KV, KV], -1)
    ops.rotary_embedding(positions, q, k, D, angles, True)
    return attend(q, k, v)


def normed(qkv, positions, angles):
    """A Qwen3's layer: q and k are normed on the way."""
    q, k, v = qkv.split([Q, KV, KV], -1)
    q, k = q * 2, k * 3
    ops.rotary_embedding(positions, q, k, D, angles, True)
    return attend(q, k, v)


def read_twice(qkv, positions, angles):
    q, k, v = qkv.split([Q, KV, KV], -1)
    q, k = q * 2, k * 3
    ops.rotary_embedding(positions, q, k, D, angles, False)
    return attend(q, k, v) + k.sum() + q.sum()


def two_layers(qkv, positions, angles):
    return projected(projected(qkv, positions, angles).repeat(1, 2), positions, angles)


def without_rope(qkv, positions, angles):
    return attend(*qkv.split([Q, KV, KV], -1))


def half_roped(qkv, positions, angles):
    """The second head's key is another one's."""
    q, k, v = qkv.split([Q, KV, KV], -1)
    ops.rotary_embedding(positions, q, k, D, angles, True)
    return attend(q, torch.cat([k[:, :D], v[:, D:]], -1), v)


def turned_back(qkv, positions, angles):
    q, k, v = qkv.split([Q, KV, KV], -1)
    ops.rotary_embedding(positions, q, k, D, angles, True, 0, True)
    return attend(q, k, v)


def other_heads(qkv, positions, angles):
    """Heads of half the size are roped."""
    q, k, v = qkv.split([Q, KV, KV], -1)
    ops.rotary_embedding(positions, q, k, D // 2, angles, True)
    return attend(q, k, v)


def written_twice(qkv, positions, angles):
    q, k, v = qkv.split([Q, KV, KV], -1)
    ops.rotary_embedding(positions, q, k, D, angles, True)
    return attend(q, k, v) + attend(q, k, v, "second")


def shared(qkv, positions, angles):
    """A layer that reads another's cache writes none: vLLM traces no write for it."""
    q, k, v = qkv.split([Q, KV, KV], -1)
    ops.rotary_embedding(positions, q, k, D, angles, True)
    return attend(q, k, v, write=False)


def late_value(qkv, positions, angles):
    q, k, v = qkv.split([Q, KV, KV], -1)
    ops.rotary_embedding(positions, q, k, D, angles, True)
    return attend(q, k, v * k)


def said(caplog):
    """What kvarn logged."""
    return [record.getMessage() for record in caplog.records if record.name == "vllm.kvarn"]


class Captured(Exception):
    """Ends a compilation at the graph that the passes see."""


def traced(function, whole=False):
    """The functional graph of a layer, of a number of tokens unknown; of a projection that others see if `whole`."""
    def stop(gm, inputs):
        raise Captured(gm)

    x, positions = torch.zeros(5, Q + 2 * KV), torch.arange(5)
    for tensor in (x, positions):
        torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        try:
            compiled = torch.compile(lambda x, *where: function(x if whole else x * 2, *where),
                                     backend=aot_autograd(fw_compiler=stop), fullgraph=True)
            compiled(x, positions, torch.zeros(64, D))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, Captured):
                raise
            return error.inner_exception.args[0]


def census(graph):
    """How many nodes of each kind that matters."""
    names = {WRITE: "write", torch.ops.kvarn.rope_store.default: "rope_store",
             torch.ops.aten.slice_scatter.default: "scatter"}
    found = Counter(names[node.target] for node in graph.nodes if node.target in names)
    found["rope"] = sum(ROPE in node.args for node in graph.nodes)
    return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("layer, count, scatters", [(projected, 1, 2), (normed, 1, 0), (read_twice, 1, 0),
                                                    (two_layers, 2, 4)])
def test_fused_once_a_layer(layer, count, scatters):
    gm = traced(layer)
    before = {"write": count, "rope": count, "scatter": scatters}
    assert census(gm.graph) == {name: n for name, n in before.items() if n}
    RopeStorePass()(gm.graph)
    gm.graph.lint()
    assert census(gm.graph) == {"rope_store": count}


def test_a_projection_that_others_see_is_scattered_into_still():
    gm = traced(projected, whole=True)
    RopeStorePass()(gm.graph)
    gm.graph.lint()
    assert census(gm.graph) == {"rope_store": 1, "scatter": 2}
    (first,) = [node for node in gm.graph.nodes if node.target is torch.ops.aten.slice_scatter.default
                and node.args[0].op == "placeholder"]
    assert first.args[1].args[0].target is torch.ops.kvarn.rope_store.default


def test_who_reads_what():
    gm = traced(projected)
    RopeStorePass()(gm.graph)
    (store,) = gm.graph.find_nodes(op="call_function", target=torch.ops.kvarn.rope_store.default)
    attend_op = torch.ops.vllm.unified_attention_with_output.default
    (attention,) = [node for node in gm.graph.nodes if attend_op in node.args]
    items = {node.args[1]: node for node in store.users}
    assert all(node.target is operator.getitem for node in store.users)
    query, key, value, written = (attention.kwargs[x] for x in ("query", "key", "value", "kv_cache_dummy_dep"))
    assert (query.args[0], key.args[0], written) == (items[0], items[1], items[2])
    assert value.args[0].target is torch.ops.aten.slice.Tensor
    assert value.args[0].args[0] is store.args[2].args[0] and value.args[0].args[0].target is torch.ops.aten.mul.Tensor
    assert value.args[0].args[1:] == (1, Q + KV, Q + 2 * KV) == store.args[2].args[1:]
    for node in (query, key, *items.values()):
        assert node.meta["val"].shape[0] == attention.kwargs["value"].meta["val"].shape[0] or node is items[2]
    assert items[0].meta["val"].is_contiguous()


@pytest.mark.parametrize("layer, reason", [
    (without_rope, Reason.NO_ROPE), (half_roped, Reason.NO_ROPE), (turned_back, Reason.OTHER_ROPE),
    (other_heads, Reason.OTHER_ROPE), (written_twice, Reason.SHARED), (late_value, Reason.LATE)])
def test_left_alone_with_the_reason(layer, reason, caplog):
    caplog.set_level(logging.INFO, "vllm.kvarn")
    gm = traced(layer)
    before = str(gm.graph)
    fuse = RopeStorePass()
    for _ in range(2):
        assert set(dict(decisions(gm.graph)).values()) == {reason}
        fuse(gm.graph)
    assert str(gm.graph) == before
    assert [reason.name in line for line in said(caplog)] == [True]  # said once


def test_a_layer_without_a_cache_of_its_own_is_no_write():
    gm = traced(shared)
    before = str(gm.graph)
    RopeStorePass()(gm.graph)
    assert str(gm.graph) == before and census(gm.graph)["rope"] == 1


class Earlier(InductorPass):
    """A user's own pass in the same place."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append(census(graph))

    def uuid(self):
        return "earlier"


def test_a_users_own_pass_runs_first():
    earlier, gm = Earlier(), traced(normed)
    RopeStorePass(earlier)(gm.graph)
    assert earlier.seen == [{"write": 1, "rope": 1}]
    assert RopeStorePass(earlier).uuid() != RopeStorePass().uuid() == RopeStorePass().uuid()


def compiled(folder, **options):
    return configure(folder, **({"kv_cache_dtype": "kvarn_k16v16"} | FUSE | options))


def test_what_is_installed_where_it_can_work(llama):
    config = compiled(llama, compilation_config={"inductor_compile_config": {fusion.HOOK: Earlier()}})
    compilation = config.compilation_config
    assert fusion.installed(config) and isinstance(compilation.inductor_compile_config[fusion.HOOK].before, Earlier)
    assert "+rotary_embedding" in compilation.custom_ops and fusion.WRITE not in compilation.splitting_ops
    assert not fusion.installed(configure(llama, kv_cache_dtype="kvarn_k16v16"))


@pytest.mark.parametrize("options, obstacle", [
    ({"enforce_eager": True}, fusion.Obstacle.NOT_COMPILED),
    ({"compilation_config": {"custom_ops": ["-rotary_embedding"]}}, fusion.Obstacle.DECOMPOSED)])
def test_what_cannot_work_is_said(llama, options, obstacle, caplog):
    caplog.set_level(logging.INFO, "vllm.kvarn")
    config = compiled(llama, **options)
    assert not fusion.installed(config)
    assert [obstacle.name in line for line in said(caplog)] == [True]


@pytest.mark.parametrize("mode, found", [("NONE", []), ("FULL_DECODE_ONLY", []), ("PIECEWISE", ["PIECEWISE"]),
                                         ("FULL", ["PIECEWISE"]), ("FULL_AND_PIECEWISE", ["PIECEWISE"])])
def test_cuda_graphs_that_would_be_captured_without_a_step(llama, mode, found):
    from vllm.config import CUDAGraphMode

    config = configure(llama, kv_cache_dtype="kvarn_k16v16")
    config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
    assert [obstacle.name for obstacle in fusion.obstacles(config)] == found


def test_models_with_windows_stay_unfused(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vllm.kvarn")
    folder = small_models.write(tmp_path, "gemma3", heads=4, kv_heads=2, sliding_window=64,
                                layer_types=["sliding_attention", "full_attention"])
    assert list(fusion.obstacles(compiled(folder))) == [fusion.Obstacle.WINDOWS]


def test_the_setting_is_a_boolean():
    assert not Settings.of({"kvarn": {}}).fuse_rope and Settings.of({"kvarn": {"fuse_rope": True}}).fuse_rope
    with pytest.raises(SpecError, match="fuse_rope"):
        Settings.of({"kvarn": {"fuse_rope": "yes"}})


@pytest.fixture
def counted(monkeypatch):
    """Calls of the op that writes and of the one that ropes and writes; how many channels that ropes."""
    calls = Counter()
    for name in ("append_paged", "rope_append_paged"):
        original = getattr(torch.ops.kvarn, name)

        def call(*args, name=name, original=original):
            calls[name] += 1
            if name == "rope_append_paged":
                calls["rotary"] = args[4].shape[1]
            return original(*args)

        monkeypatch.setattr(torch.ops.kvarn, name, call)
    return calls


TEXTS = (1, 2, 126, 127, 128, 129, 255, 256, 257, 300)


def test_tokens_are_stock_vllms(engines, llama, stock, counted, caplog):
    caplog.set_level(logging.INFO, "vllm.kvarn")
    llm = engines(llama, kv_cache_dtype="kvarn_k16v16", enforce_eager=False, **FUSE)
    assert "kvarn: RoPE and the cache write are one op." in said(caplog)
    assert all(layer.attn_backend is KVarnApart for layer in layers(llm))
    texts = prompts(*TEXTS, seed=40)
    assert greedy(llm, texts, 12) == greedy(stock, texts, 12)
    assert counted["rope_append_paged"] > 12 * len(layers(llm)) and not counted["append_paged"]
    texts = prompts(100, 120, seed=41)
    assert greedy(llm, texts, 150) == greedy(stock, texts, 150)


@pytest.mark.parametrize("architecture, extra", [("qwen3", {}), ("llama", {"partial_rotary_factor": 0.5})])
def test_normed_keys_and_partly_roped_ones(engines, tmp_path_factory, counted, architecture, extra):
    folder = small_models.write(tmp_path_factory.mktemp(architecture), architecture, **extra)
    llm = engines(folder, kv_cache_dtype="kvarn_k16v16", enforce_eager=False, **FUSE)
    texts = prompts(1, 127, 128, 260, seed=45)
    assert greedy(llm, texts, 8) == greedy(engines(folder), texts, 8)
    assert counted["rope_append_paged"] >= 8 * len(layers(llm)) and not counted["append_paged"]
    assert counted["rotary"] == 64 * extra.get("partial_rotary_factor", 1)


def test_a_graph_in_which_nothing_is_found_writes_apart(engines, llama, stock, counted, monkeypatch, caplog):
    monkeypatch.setattr("kvarn_compile.vllm.graph_pass._plain", lambda *args: False)
    never_cached = uuid4().hex
    monkeypatch.setattr(RopeStorePass, "uuid", lambda self: never_cached)
    caplog.set_level(logging.INFO, "vllm.kvarn")
    llm = engines(llama, kv_cache_dtype="kvarn_k16v16", enforce_eager=False, seed=1, **FUSE)
    assert sum(Reason.OTHER_ROPE.name in line for line in said(caplog)) == 1
    texts = prompts(*TEXTS, seed=42)
    assert greedy(llm, texts, 6) == greedy(stock, texts, 6)
    assert counted["append_paged"] >= 6 * len(layers(llm)) and not counted["rope_append_paged"]


def test_eager_engines_keep_the_write_in_attention(engines, llama, stock, counted):
    llm = engines(llama, kv_cache_dtype="kvarn_k16v16", **FUSE)
    texts = prompts(130, 5, seed=43)
    assert greedy(llm, texts, 6) == greedy(stock, texts, 6)
    assert counted["append_paged"] >= 6 * len(layers(llm)) and not counted["rope_append_paged"]


def test_a_packed_cache_gets_the_same_tokens(engines, llama, counted):
    """Beside an engine that is compiled too: inductor's arithmetic is not the eager one's to the last bit."""
    texts, options = prompts(100, 200, seed=44), {"kv_cache_dtype": "kvarn_k4v2_g128", "enforce_eager": False}
    apart = engines(llama, compilation_config={"custom_ops": ["+rotary_embedding"]}, **options)
    fused = engines(llama, **options, **FUSE)
    assert greedy(fused, texts, 40) == greedy(apart, texts, 40)
    assert counted["append_paged"] == counted["rope_append_paged"] > 0
    for ours, theirs in zip(layers(fused), layers(apart), strict=True):
        assert ours.kv_cache.any() and (ours.kv_cache != theirs.kv_cache).float().mean() < 1e-3


def test_the_profile_run_meets_every_launch_of_serving(counted):
    layout = paged_layout(PRESETS["k4v2_g128"].key, 64, torch.float16)
    shape = warmup.Shape(layout=layout, heads=4, kv_heads=2, scale=1.0, rows=3, tokens=300, length=400, decode=2,
                         scratch=700)
    warmup.compile_rope(shape, 32, torch.float16, True, torch.device("cpu"))
    assert counted["rope_append_paged"] == len([*warmup.decodes(shape), *warmup.prompts(shape)]) > 8
    assert counted["rotary"] == 32


def test_a_captured_graph_without_a_step_is_refused(monkeypatch):
    layer, x = SimpleNamespace(impl=None, layer_name=""), SimpleNamespace(shape=(1, KV), is_cuda=True)
    x.reshape = lambda *shape: x
    for module in (rope_store, impl):
        monkeypatch.setattr(module, "get_attention_context", lambda name: (None, layer, None, None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KVarnError, match="FULL_DECODE_ONLY"):
        rope_store.rope_store(x, x, x, None, None, D, True, "layer")
    with pytest.raises(KVarnError, match="FULL_DECODE_ONLY"):
        impl.KVarnImpl.do_kv_cache_update(None, layer, x, x, None, None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert impl.KVarnImpl.do_kv_cache_update(None, layer, x, x, None, None) is None
