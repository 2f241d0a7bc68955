import logging
from dataclasses import replace

import pytest
import torch
import toy_models
from drive import LOSSLESS, STYLES, Driver, assert_same, prompt
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from toy_models import Config

import kvarn_compile
from kvarn_compile.binding import binding_of


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("style", STYLES)
def test_lossless_equals_plain(style, length):
    config = Config()
    packed = Driver(style, config).compile()
    assert_same(Driver(style, config).generate(prompt(config, length)), packed.generate(prompt(config, length)))
    assert all(binding_of(cache) for cache in packed.caches())


@pytest.mark.parametrize("heads, kv_heads, batch", [(2, 2, 3), (4, 1, 1), (7, 1, 3)])
@pytest.mark.parametrize("style", STYLES)
def test_batches_and_head_groups(style, heads, kv_heads, batch):
    config = Config(heads=heads, kv_heads=kv_heads, head_dim=32, batch=batch)
    ids = prompt(config, 126)
    assert_same(Driver(style, config).generate(ids), Driver(style, config).compile().generate(ids))


def test_counters_count_every_attention():
    Driver("gptfast", Config(layers=3)).compile().step(prompt(Config(), 5))
    assert counters["kvarn"] == {"attention_found": 3, "attention_rewritten": 3, "attention_refused": 0}


@pytest.mark.parametrize("style", STYLES)
def test_prefill_and_decode_share_one_store(style):
    driver = Driver(style, Config()).compile()
    driver.step(prompt(driver.config, 9))
    stores = [binding_of(cache).store for cache in driver.caches()]
    driver.step(prompt(driver.config, 1))
    driver.step(prompt(driver.config, 1))
    assert counters["stats"]["unique_graphs"] >= 2
    assert all(binding_of(cache).store is store for cache, store in zip(driver.caches(), stores, strict=True))
    assert stores[0].lengths.tolist() == [11]


@pytest.mark.parametrize("style", STYLES)
def test_second_prompt_in_the_same_cache(style):
    config = Config()
    plain, packed = Driver(style, config), Driver(style, config).compile()
    for driver in (plain, packed):
        driver.generate(prompt(config, 200))
        driver.rewind(0)
    assert_same(plain.generate(prompt(config, 40, seed=8)), packed.generate(prompt(config, 40, seed=8)))


@pytest.mark.parametrize("position", [260, 250, 100, 128])
@pytest.mark.parametrize("style", STYLES)
def test_rewind_into_a_closed_tile(style, position):
    config = Config()
    plain, packed = Driver(style, config), Driver(style, config).compile()
    for driver in (plain, packed):
        driver.generate(prompt(config, 259))
        driver.rewind(position)
    assert_same(plain.generate(prompt(config, 3, seed=8)), packed.generate(prompt(config, 3, seed=8)))


@pytest.mark.parametrize("preset, least", [("k8v8_g128", 35), ("k4v4_g128", 12), ("k4v2_g128", 6), ("k4v2_g64", 6)])
def test_quantized_logits_stay_close(preset, least):
    config = Config()
    _, plain = Driver("gptfast", config).generate(prompt(config, 300))
    packed = Driver("gptfast", config).compile(preset=preset)
    packed.step(prompt(config, 300))
    packed.rewind(299)
    signal, noise = plain[0].norm(), (plain[0] - packed.step(prompt(config, 300)[:, -1:])).norm()
    assert noise > 0
    assert 20 * (signal / noise).log10() > least


def test_training_and_grad_mode_run_plain(caplog):
    config = Config()
    driver, plain = Driver("gptfast", config).compile(), Driver("gptfast", config)
    positions = torch.arange(4)
    loss = driver.call(prompt(config, 4), positions).square().sum()
    loss.backward()
    plain.model(prompt(config, 4), positions).square().sum().backward()
    torch.testing.assert_close(driver.model.embed.weight.grad, plain.model.embed.weight.grad)
    assert not counters["kvarn"]
    assert "gradients are recorded" in caplog.text
    assert not any(binding_of(cache) for cache in driver.caches())


def test_cache_packed_earlier_is_plain_again_for_a_graph_with_gradients(caplog):
    config = Config()
    driver, plain = Driver("gptfast", config).compile(), Driver("gptfast", config)
    for d in (driver, plain):
        d.step(prompt(config, 130))
    out = driver.call(prompt(config, 1), torch.arange(130, 131))
    torch.testing.assert_close(out, plain.model(prompt(config, 1), torch.arange(130, 131)))
    assert "unpacking a KV cache" in caplog.text
    torch.testing.assert_close(driver.caches()[0].detach(), plain.caches()[0].detach())


class Untouchable(toy_models.HFModel):
    """Its cache is read by more than attention."""

    def forward(self, ids, cache):
        return super().forward(ids, cache) + cache[0].keys.mean() + cache[1].keys.mean()


def test_unsupported_model_is_unchanged_and_says_why(caplog):
    config = Config()
    plain, refused = Driver("hf", config), Driver("hf", config)
    for driver in (plain, refused):
        driver.model = driver.call = Untouchable(config).eval()
    refused.model.load_state_dict(plain.model.state_dict())
    refused.compile()
    assert_same(plain.generate(prompt(config, 20)), refused.generate(prompt(config, 20)))
    assert counters["kvarn"]["attention_rewritten"] == 0 < counters["kvarn"]["attention_refused"]
    assert "2 of 2 attentions keep a plain cache" in caplog.text
    assert not any(binding_of(cache) for cache in refused.caches())
    torch.testing.assert_close(plain.caches()[0], refused.caches()[0])


class HalfTouched(toy_models.HFModel):
    """The cache of its first layer is read by more than attention, the second layer's is not."""

    def forward(self, ids, cache):
        return super().forward(ids, cache) + cache[0].keys.mean()


def test_supported_and_unsupported_attentions_in_one_model():
    config = Config()
    plain, mixed = Driver("hf", config), Driver("hf", config)
    for driver in (plain, mixed):
        driver.model = driver.call = HalfTouched(config).eval()
    mixed.model.load_state_dict(plain.model.state_dict())
    mixed.compile()
    assert_same(plain.generate(prompt(config, 20)), mixed.generate(prompt(config, 20)))
    assert [bool(binding_of(layer.keys)) for layer in mixed.cache] == [False, True]


@pytest.mark.parametrize("change, preset, reason", [
    ({"head_dim": 48}, "k4v2_g128", "head_dim=48"), ({"dtype": torch.float64}, "k4v2_g128", "dtype torch.float64")])
def test_format_without_a_record_runs_plain(change, preset, reason, caplog):
    config = replace(Config(), **change)
    plain, refused = Driver("gptfast", config), Driver("gptfast", config)
    for driver in (plain, refused):
        driver.model.to(config.dtype)
    refused.compile(preset=preset)
    assert_same(plain.generate(prompt(config, 6)), refused.generate(prompt(config, 6)))
    assert reason in caplog.text
    assert counters["kvarn"]["attention_rewritten"] == 0


def test_head_dim_without_rotation_is_fine_lossless():
    config = Config(head_dim=48)
    assert_same(Driver("gptfast", config).generate(prompt(config, 130)),
                Driver("gptfast", config).compile().generate(prompt(config, 130)))
    assert counters["kvarn"]["attention_rewritten"] == 4


@pytest.mark.parametrize("preset", ["k16v16", "k4v2_g128", "upstream_k4v2_g128"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_in_keys_do_not_crash(preset, bad):
    config = Config()
    driver = Driver("gptfast", config).compile(preset=preset)
    with torch.no_grad():
        driver.model.embed.weight[5] = bad
    ids = prompt(config, 130)
    ids[ids == 5], ids[:, 100] = 6, 5
    assert driver.step(ids).isnan().any()
    driver.rewind(0)
    ids[:, 100] = 6
    assert driver.step(ids).isfinite().all(), "a second prompt overwrites the poisoned tokens"


def test_bad_options_are_named():
    with pytest.raises(BackendCompilerFailed, match="option 'presett' is unknown; did you mean 'preset'"):
        Driver("gptfast", Config()).compile(presett="k4v2_g128").step(prompt(Config(), 3))


def test_two_models_keep_their_caches_apart():
    config = Config()
    first, second = Driver("gptfast", config).compile(), Driver("gptfast", config).compile()
    plain = Driver("gptfast", config)
    first.step(prompt(config, 50, seed=1))
    assert_same(plain.generate(prompt(config, 30)), second.generate(prompt(config, 30)))
    assert binding_of(first.caches()[0]).store.lengths.tolist() == [50]


def test_one_model_with_caches_of_several_lengths():
    """Dynamo makes the length symbolic at the second cache."""
    model = Driver("hf", Config()).model
    compiled = torch.compile(model, backend="kvarn", options=LOSSLESS)
    for capacity in (160, 320, 200):
        config = Config(capacity=capacity)
        plain, packed = Driver("hf", config), Driver("hf", config)
        model.config, plain.call, packed.call = config, model, compiled
        assert_same(plain.generate(prompt(config, 131)), packed.generate(prompt(config, 131)))
        assert all(binding_of(cache).store.capacity == capacity for cache in packed.caches())


def test_cache_with_another_owner_stays_plain(caplog):
    config = Config()
    plain, shared = Driver("gptfast", config), Driver("gptfast", config).compile()
    view = shared.caches()[0][0]
    assert_same(plain.generate(prompt(config, 131)), shared.generate(prompt(config, 131)))
    assert "another tensor shares its memory" in caplog.text
    assert torch.equal(view, plain.caches()[0][0])
    assert not binding_of(shared.caches()[0])


def test_inference_mode():
    config = Config()
    plain, packed = Driver("gptfast", config), Driver("gptfast", config).compile()
    with torch.inference_mode():
        packed_out = packed.generate(prompt(config, 131))
        assert all(binding_of(cache) for cache in packed.caches())
        kvarn_compile.release(packed.model)
    assert_same(plain.generate(prompt(config, 131)), packed_out)


def test_caches_made_in_inference_mode():
    config = Config()
    with torch.inference_mode():
        plain, packed = Driver("gptfast", config), Driver("gptfast", config).compile()
        assert_same(plain.generate(prompt(config, 131)), packed.generate(prompt(config, 131)))
        assert all(binding_of(cache) for cache in packed.caches())
        assert kvarn_compile.release(packed.model) == 2
        torch.testing.assert_close(packed.caches()[0], plain.caches()[0])


def test_log_setting_exists():
    torch._logging.set_logs(modules={"kvarn_compile": logging.INFO})
    assert logging.getLogger("kvarn_compile").level == logging.INFO
    torch._logging.set_logs()


def test_a_failing_rewrite_is_no_graph_break(monkeypatch):
    from torch._subclasses.fake_tensor import DynamicOutputShapeException

    def failing(*args, **kwargs):
        raise DynamicOutputShapeException(torch.ops.aten.nonzero.default)

    monkeypatch.setattr("kvarn_compile.backend.rewrite", failing)
    with pytest.raises(BackendCompilerFailed, match="the rewrite failed"):
        Driver("gptfast", Config()).compile().step(prompt(Config(), 3))


def test_one_shared_cache_keeps_every_cache_of_the_graph_plain():
    config = Config()
    plain, shared = Driver("gptfast", config), Driver("gptfast", config).compile(preset="k4v2_g128")
    view = shared.caches()[2][0]
    assert_same(plain.generate(prompt(config, 131)), shared.generate(prompt(config, 131)))
    assert not any(binding_of(cache) for cache in shared.caches())
    assert torch.equal(view, plain.caches()[2][0])


def test_dynamic_shapes():
    config = Config(batch=2)
    plain, packed = Driver("gptfast", config), Driver("gptfast", config)
    packed.call = torch.compile(packed.model, backend="kvarn", options=LOSSLESS, dynamic=True)
    assert_same(plain.generate(prompt(config, 131)), packed.generate(prompt(config, 131)))
    assert all(binding_of(cache) for cache in packed.caches())


class Broken(toy_models.HFModel):
    """A graph break between the cache's write and its read."""

    def __init__(self, config):
        def attention(q, k, v, mask):
            torch._dynamo.graph_break()
            return toy_models.sdpa_attention(q, k, v, mask)

        super().__init__(config, attention)


def test_graph_that_only_writes_does_not_take_the_cache():
    config = Config()
    plain, broken = Driver("hf", config), Driver("hf", config)
    broken.model = Broken(config).eval()
    broken.model.load_state_dict(plain.model.state_dict())
    broken.compile()
    assert_same(plain.generate(prompt(config, 131)), broken.generate(prompt(config, 131)))
    assert not any(binding_of(cache) for cache in broken.caches())


@pytest.mark.parametrize("style", STYLES)
def test_one_graph_without_breaks(style):
    config = Config()
    plain, packed = Driver(style, config), Driver(style, config)
    packed.call = torch.compile(packed.model, backend="kvarn", options=LOSSLESS, fullgraph=True)
    assert_same(plain.generate(prompt(config, 131)), packed.generate(prompt(config, 131)))
